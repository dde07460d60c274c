"""One safetensors file's header, checked before anything is believed.

Format: https://huggingface.co/docs/safetensors: 8 bytes little-endian length, a JSON object of that
length, then the tensors, which tile the rest of the file without gaps.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.errors import ConfigurationError

# The format allows 100 MB. SD3.5 with its encoders has 2,000 tensors in 300 kB; the rest is room
# for workflows and thumbnails that tools keep in the metadata.
LONGEST_HEADER = 16 << 20
_MOST_TENSORS = 100_000
_MOST_COMMAS = 2_000_000  # what JSON becomes in memory is bounded before it is parsed
_LONGEST_NAME = 1000

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits an element of each dtype that the format knows."""

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        dtype: As the format spells it: `BF16`, `F8_E4M3`.
        shape: Of the tensor.
        begin: First byte, from the start of the file.
        end: Byte behind its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Return how many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a file says it holds; its tensors are known to tile it."""

    path: Path
    size: int  # bytes of the whole file
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Raises:
        ConfigurationError: The file is absent, a pickle, cut short, or its header is not one. The
            message names the file and, where there is one, the tensor.
    """
    if path.suffix.lower() in _PICKLES:
        raise _refusal(path, "is a pickle, which can run code when it is read")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer for ever
            raise _refusal(path, "is no regular file")
        size = status.st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8 or length > LONGEST_HEADER:
                raise _refusal(path, _what_it_is(start, length, size))
            text = stream.read(length)
    except OSError as error:
        raise _refusal(path, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # an index may name a file as no file can be named
        raise _refusal(path, f"cannot be read: {error}") from None
    parsed = _parsed(path, text)
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refusal(path, "has metadata that are not texts")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in parsed.items()}
    _check_tiling(path, tensors, 8 + length, size)
    return Header(path, size, tensors, metadata)


def _what_it_is(start: bytes, length: int, size: int) -> str:
    if start[:4] == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        return "is a pickle by its first bytes, which can run code when it is read"
    if start[:4] == b"GGUF":
        return "is a GGUF file"
    if len(start) == 8 and length <= size - 8:
        return f"has a header of {length:,} bytes; at most {LONGEST_HEADER:,} are read"
    return f"is not a safetensors file, or is cut short within its header ({size:,} bytes)"


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    too_many = text.count(b"{") > _MOST_TENSORS or text.count(b"[") > 2 * _MOST_TENSORS
    if too_many or text.count(b",") > _MOST_COMMAS:
        raise _refusal(path, f"has a header of more than {_MOST_TENSORS:,} tensors")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise _refusal(path, f"has the name {twice[:_LONGEST_NAME]!r} twice in its header")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"has a header that is no JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise _refusal(path, "has a header that is no JSON object")
    return parsed


def _tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if len(name) > _LONGEST_NAME:
        raise _refusal(path, f"names a tensor with {len(name)} characters")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise _refusal(path, f"does not say dtype, shape and data_offsets of tensor {name!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _refusal(path, f"holds tensor {name!r} in an unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _refusal(path, f"gives tensor {name!r} a shape or offsets that are no counts")
    begin, end = offsets
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if bits != 8 * (end - begin):
        raise _refusal(
            path,
            f"gives tensor {name!r} {end - begin} bytes; {dtype} {shape} takes {bits // 8}",
        )
    return StoredTensor(dtype, tuple(shape), start + begin, start + end)


def _are_counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(each) is int and 0 <= each < 1 << 48 for each in value)
    )


def _check_tiling(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            what = "overlaps another" if tensor.begin < at else "leaves a gap before it"
            raise _refusal(path, f"is damaged: tensor {name!r} {what}")
        at = tensor.end
    if at > size:
        raise _refusal(path, f"is cut short: {size:,} of {at:,} bytes")
    if at < size:
        raise _refusal(path, f"is damaged: {size - at:,} bytes behind its last tensor")


def _refusal(path: Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} {what}.",
        field="model.path",
        value=str(path),
        allowed="a whole .safetensors file",
    )
