"""What a store says of an object's bytes, and how to check it part by part as they come.

An ETag is the MD5 of the object, or of an upload in parts the MD5 of the parts' MD5s with their
number behind it; not so where the store encrypts with keys of KMS, and then it does not look like
one. Whoever uploaded may have had the store keep a SHA-256 or CRC-32 made in the same way (Amazon
S3 User Guide, "Checking object integrity"); boto3 does since 1.36, and a CRC-32 takes a sixth of
the time of an MD5. Where it kept another kind, the ETag is used.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

BUFFER_BYTES = 256 << 10

Algorithm = Literal["sha256", "crc32", "md5"]
_TOLD: Mapping[str, Algorithm] = {"ChecksumSHA256": "sha256", "ChecksumCRC32": "crc32"}
_MD5 = re.compile(r'^"?([0-9a-f]{32})(?:-([1-9]\d{0,4}))?"?$')


class _Sum(Protocol):
    def update(self, data: Any, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._crc = 0

    def update(self, data: Any) -> None:
        self._crc = zlib.crc32(data, self._crc)

    def digest(self) -> bytes:
        return self._crc.to_bytes(4, "big")


_NEW: Mapping[Algorithm, Callable[[], _Sum]] = {
    "sha256": hashlib.sha256,
    "crc32": _Crc32,
    "md5": lambda: hashlib.md5(usedforsecurity=False),
}


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the bytes of an object must come to.

    Attributes:
        algorithm: Of each part, and of the parts' digests together.
        value: Hexadecimal.
        part_bytes: Length of each part but the last; None: it is of the whole object.
    """

    algorithm: Algorithm
    value: str
    part_bytes: int | None

    def is_of(self, digests: Sequence[bytes]) -> bool:
        """Return whether the parts' digests, in order, or the whole's one, come to it."""
        if self.part_bytes is None:
            return [each.hex() for each in digests] == [self.value]
        together = _NEW[self.algorithm]()
        together.update(b"".join(digests))
        return together.digest().hex() == self.value


def parts_in(etag: str) -> int | None:
    """Return the number of parts that an ETag tells of; 1 of a whole object, None: of nothing."""
    found = _MD5.match(etag)
    return None if found is None else int(found[2] or 1)


def checksum_of(
    etag: str, size: int, part_bytes: int | None = None, told: Mapping[str, Any] | None = None
) -> Checksum | None:
    """Return what an object can be checked by.

    Args:
        etag: Of the object.
        size: bytes.
        part_bytes: Of its first part, as the store tells; None: it does not.
        told: The store's answer about the object, if its checksums were asked for.

    Returns:
        None where nothing is told that can be used.
    """
    sums = [(told[name], each) for name, each in _TOLD.items() if told and name in told]
    for value, algorithm in sums:
        found = _stated(value, algorithm, size, part_bytes)
        if found is not None:
            return found
    match = _MD5.match(etag)
    if match is None:
        return None
    if match[2] is None:
        return Checksum("md5", match[1], None)
    return _of_parts("md5", match[1], int(match[2]), size, part_bytes)


def _stated(value: str, algorithm: Algorithm, size: int, part_bytes: int | None) -> Checksum | None:
    encoded, _, parts = value.partition("-")
    try:
        digest = base64.b64decode(encoded, validate=True).hex()
    except binascii.Error:
        return None
    if parts.isdecimal():
        return _of_parts(algorithm, digest, int(parts), size, part_bytes)
    return Checksum(algorithm, digest, None)


def _of_parts(
    algorithm: Algorithm, value: str, parts: int, size: int, part_bytes: int | None
) -> Checksum | None:
    if parts == 1:
        part_bytes = max(size, 1)  # nobody need be asked
    if not part_bytes or -(-size // part_bytes) != parts:
        return None
    return Checksum(algorithm, value, part_bytes)


class PartDigests:
    """Digest of each part of a range, as its bytes come in order.

    Args:
        algorithm: Which.
        part_bytes: Length of a part.
    """

    def __init__(self, algorithm: Algorithm, part_bytes: int) -> None:
        self._new = _NEW[algorithm]
        self._part_bytes = part_bytes
        self._room = 0
        self._sums: list[_Sum] = []

    def take(self, piece: memoryview) -> None:
        """Take the next bytes."""
        while piece:
            if not self._room:
                self._sums.append(self._new())
                self._room = self._part_bytes
            mine = piece[: self._room]
            self._sums[-1].update(mine)
            self._room -= len(mine)
            piece = piece[len(mine) :]

    @property
    def digests(self) -> list[bytes]:
        """Of all parts so far."""
        return [each.digest() for each in self._sums]


def digests_of(target: int, size: int, checksum: Checksum) -> list[bytes]:
    """Return the digests of a file that its checksum is made of.

    Args:
        target: Descriptor.
        size: bytes of it that count.
        checksum: Says whether it is one of the whole or one of parts, which go to all cores.
    """
    each = checksum.part_bytes or max(size, 1)

    def digest_at(begin: int) -> bytes:
        digest = _NEW[checksum.algorithm]()
        at, end = begin, min(begin + each, size)
        while at < end and (piece := os.pread(target, min(BUFFER_BYTES, end - at), at)):
            digest.update(piece)
            at += len(piece)
        return digest.digest()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(digest_at, range(0, max(size, 1), each)))
