"""Objects of a bucket into files: many ranges at once, hashed as they come, never whole in memory.

A range goes from the socket by 256 KiB to its place in the file. What
breaks off in the midst is asked for again, so often as the settings say.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from serve.errors import StorageUnavailable
from serve.model_cache.checksums import (
    BUFFER_BYTES,
    Checksum,
    PartDigests,
    checksum_of,
    digests_of,
    parts_in,
)
from serve.model_cache.ranges import PIECE_BYTES, Range, ranges_of
from serve.model_cache.remote_files import RemoteFile, Source
from serve.s3_client import s3_client
from serve.storage_answers import contents_of
from serve.storage_errors import error_code, explain
from serve.storage_settings import StoreConnection

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_Result = TypeVar("_Result")
_LASTING = ("NoSuchBucket", "NoSuchKey", "AccessDenied", "InvalidAccessKeyId", "403", "404")


class ObjectChanged(Exception):
    """An object is another one than the listing told of."""


class DamagedObject(Exception):
    """What came is not what the store's own checksum says."""


@dataclass
class _Download:
    """One object on its way.

    Attributes:
        file: Which.
        target: Descriptor of a file of its size.
        ranges: That it is read in.
        checksum: That it is checked by; None: there is none to be had.
        digests: Of each part of each range, by the range's begin.
    """

    file: RemoteFile
    target: int
    ranges: Sequence[Range]
    checksum: Checksum | None
    digests: dict[int, list[bytes]] = field(default_factory=dict)

    @property
    def part_bytes(self) -> int | None:
        """Of what is hashed as it comes; None: a whole that comes in pieces, or no checksum."""
        if self.checksum is None:
            return None
        return self.checksum.part_bytes or (self.file.size if len(self.ranges) == 1 else None)

    def part_digests(self) -> PartDigests | None:
        """Return what takes the bytes of one range."""
        if self.checksum is None or self.part_bytes is None:
            return None
        return PartDigests(self.checksum.algorithm, self.part_bytes)


class Transfer:
    """Reads what one model has in its store, or what else has a prefix. Thread-safe.

    Args:
        store: Where it is.
        source: The model.
        connections: How many reads there may be at a time.
        names_settings: Whether errors name the settings that the model's source has; else those of
            the service's own store.
    """

    def __init__(
        self,
        store: StoreConnection,
        source: Source,
        *,
        connections: int,
        names_settings: bool = True,
    ) -> None:
        self._store = store
        self.source = source
        self.connections = connections
        self._names_settings = names_settings
        self._guard = threading.Lock()
        self._client: S3Client | None = None
        self.done_bytes = 0
        """Read so far."""

    def listing(self) -> list[tuple[str, int, str]]:
        """Return key, size in bytes and ETag of every object below the model's prefix.

        Raises:
            StorageUnavailable: The store does not answer, or not us.
        """

        def ask() -> list[tuple[str, int, str]]:
            pages = self._s3().get_paginator("list_objects_v2")
            found = []
            for page in pages.paginate(Bucket=self.source.bucket, Prefix=self.source.below):
                for entry in contents_of(page, self._store.endpoint_url):
                    found.append((entry["Key"], entry["Size"], entry["ETag"]))
            return found

        return self._translated(ask)

    def small(self, key: str) -> bytes:
        """Return a small object's bytes.

        Raises:
            StorageUnavailable: The store does not answer, or has no such object.
        """

        def ask() -> bytes:
            answer = self._s3().get_object(Bucket=self.source.bucket, Key=key)
            data: bytes = answer["Body"].read()
            return data

        return self._translated(ask)

    def piece(self, file: RemoteFile, begin: int, length: int) -> bytes:
        """Return some bytes of an object.

        Raises:
            ObjectChanged: It was replaced meanwhile.
            StorageUnavailable: The store does not answer.
        """
        part = Range(begin, length)

        def ask() -> tuple[str, bytes]:
            answer = self._s3().get_object(
                Bucket=self.source.bucket, Key=file.key, Range=part.header
            )
            return answer["ETag"], answer["Body"].read()

        if not length:
            return b""
        etag, data = self._translated(ask)
        if etag != file.etag or len(data) != length:
            raise ObjectChanged(file.key)
        return data

    def fetch(self, wanted: Sequence[tuple[RemoteFile, int]]) -> dict[str, Checksum | None]:
        """Read objects into files.

        Args:
            wanted: Objects, and descriptors of files of their sizes.

        Returns:
            By what each was checked, by path; None: the store tells nothing of its bytes.

        Raises:
            ObjectChanged: One was replaced meanwhile.
            DamagedObject: What came is not what its checksum says, twice.
            StorageUnavailable: The store does not answer.
            OSError: The disk.
        """
        self.done_bytes = 0
        with ThreadPoolExecutor(self.connections, thread_name_prefix="model") as pool:
            downloads = list(pool.map(lambda pair: self._planned(*pair), wanted))
            # The longest first, so that none is left to a single connection at the end.
            downloads.sort(key=lambda each: each.file.size, reverse=True)
            self._all(
                pool, [(self._read, (each, part)) for each in downloads for part in each.ranges]
            )
            self._all(pool, [(self._check, (each,)) for each in downloads])
        return {each.file.path: each.checksum for each in downloads}

    def _checksum(self, file: RemoteFile) -> Checksum | None:
        """Return by what an object can be checked; of a large one the store is asked for more."""
        parts = parts_in(file.etag)
        if file.size <= PIECE_BYTES and parts == 1:
            return checksum_of(file.etag, file.size)
        told = self._told_of(file, ChecksumMode="ENABLED")
        part = self._told_of(file, PartNumber=1) if parts is not None and parts > 1 else {}
        return checksum_of(file.etag, file.size, part.get("ContentLength"), told)

    def _planned(self, file: RemoteFile, target: int) -> _Download:
        checksum = self._checksum(file)
        part_bytes = None if checksum is None else checksum.part_bytes
        return _Download(file, target, ranges_of(file.size, part_bytes), checksum)

    def _told_of(self, file: RemoteFile, **asked: Any) -> Mapping[str, Any]:
        """Return what the store says of an object; nothing where it does not know what is asked."""
        try:
            return self._translated(
                lambda: self._s3().head_object(Bucket=self.source.bucket, Key=file.key, **asked)
            )
        except StorageUnavailable:
            return {}

    def _all(
        self, pool: ThreadPoolExecutor, calls: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]
    ) -> None:
        futures: list[Future[None]] = [pool.submit(call, *given) for call, given in calls]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
        finally:
            for each in futures:
                each.cancel()

    def _read(self, download: _Download, part: Range) -> None:
        tries = self._store.max_attempts
        for attempt in range(1, tries + 1):
            try:
                self._read_once(download, part)
                return
            except (BotoCoreError, ClientError) as error:
                lasting = isinstance(error, ClientError) and error_code(error) in _LASTING
                if lasting or attempt == tries:
                    raise self._explained(error) from None
                time.sleep(random.uniform(0, 0.1 * 2**attempt))

    def _read_once(self, download: _Download, part: Range) -> None:
        file = download.file
        answer = self._s3().get_object(Bucket=self.source.bucket, Key=file.key, Range=part.header)
        body = answer["Body"]
        if answer["ETag"] != file.etag or answer["ContentLength"] != part.length:
            body.close()
            raise ObjectChanged(file.key)
        digests = download.part_digests()
        at = part.begin
        try:
            while piece := body.read(BUFFER_BYTES):
                if digests is not None:
                    digests.take(memoryview(piece))
                _write(download.target, memoryview(piece), at)
                at += len(piece)
                self._told(len(piece))
        except BaseException:
            self._told(part.begin - at)
            body.close()
            raise
        if digests is not None:
            download.digests[part.begin] = digests.digests

    def _check(self, download: _Download) -> None:
        checksum = download.checksum
        if checksum is None:
            return
        if download.part_bytes is None:
            digests = digests_of(download.target, download.file.size, checksum)
        else:
            digests = [one for each in download.ranges for one in download.digests[each.begin]]
        matches = checksum.is_of(digests)
        if not matches:
            raise DamagedObject(download.file.key)

    def _told(self, count: int) -> None:
        with self._guard:
            self.done_bytes += count

    def _s3(self) -> S3Client:
        with self._guard:
            if self._client is None:
                self._client = s3_client(
                    self._store, self._store.endpoint_url, connections=self.connections
                )
            return self._client

    def _translated(self, call: Callable[[], _Result]) -> _Result:
        try:
            return call()
        except (BotoCoreError, ClientError, StorageUnavailable) as error:
            raise self._explained(error) from None

    def _explained(
        self, error: BotoCoreError | ClientError | StorageUnavailable
    ) -> StorageUnavailable:
        """Return the error in the words of these settings."""
        told = error
        if not isinstance(told, StorageUnavailable):
            told = explain(
                told,
                bucket=self.source.bucket,
                endpoint_url=self._store.endpoint_url,
                region=self._store.region,
            )
        if not self._names_settings:
            return told
        if told.field == "storage.bucket":
            field, value = "model.path", str(self.source)
        else:
            field, value = (told.field or "").replace("storage.", "model.source."), told.value
        remedy = (told.allowed or "").replace("storage.bucket", "model.path")
        return StorageUnavailable(
            told.message.replace("storage.", "model.source."),
            field=field,
            value=value,
            allowed=remedy.replace("storage.", "model.source."),
        )


def _write(target: int, piece: memoryview, at: int) -> None:
    while piece:
        count = os.pwrite(target, piece, at)
        piece, at = piece[count:], at + count
