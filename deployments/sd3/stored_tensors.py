"""The tensors of one model component, read one by one from mapped files.

Which file and bytes a tensor comes from, and what happens to it, is `serve.checkpoints`' to say;
here bytes become tensors. Nothing is ever unpickled, and nothing is copied that need not be.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from serve.checkpoints.part import Part
from serve.checkpoints.reference import part_in
from serve.checkpoints.tensor_files import read_json as read_json
from serve.errors import ConfigurationError

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# A cold disk is read this far ahead of what is being placed.
_READ_AHEAD = 512 << 20


class StoredTensors:
    """A component's tensors by the names its model has.

    Args:
        where: A folder such as `MODEL/transformer`, one that refers to files elsewhere, or a part
            already found.

    Raises:
        ConfigurationError: No safetensors files, a missing or damaged shard, a broken index, a
            quantisation that is not read.
    """

    def __init__(self, where: Path | Part) -> None:
        self.part = where if isinstance(where, Part) else part_in(where)
        self._mapped: dict[Path, _MappedFile] = {}
        self._mapping = threading.Lock()  # one thread may read ahead of another

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self.part.sources)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return Path(self.part.file_of(name))

    def place(self, name: str) -> tuple[str, int, int]:
        """Return where a tensor lies, for reading many in the order in which a disk has them."""
        source = self.part.sources[name]
        if source.stored is None:
            return "", 0, 0
        at = source.part[0] if source.part else 0
        return str(self.file_of(name)), self.part.files.tensors[source.stored].begin, at

    def in_full_precision(self, module: str) -> bool:
        """Return whether the files ask for ordinary products in a Linear layer."""
        return module in self.part.notes.full_precision

    def read(self, name: str) -> Tensor:
        """Return one tensor on the host, as stored: a view of the file wherever that can be.

        Raises:
            ConfigurationError: The file cannot be read, or torch has no such dtype.
        """
        source = self.part.sources[name]
        if source.dtype not in _DTYPES:
            raise self._damaged(self.file_of(name), f"tensor {name!r} is {source.dtype}")
        dtype = _DTYPES[source.dtype]
        if source.stored is None:
            return torch.eye(source.shape[0], dtype=dtype)
        tensor = self.part.files.tensors[source.stored]
        begin, end = tensor.begin, tensor.end
        if source.part:
            at, pieces = source.part
            size = (end - begin) // pieces
            begin, end = begin + at * size, begin + (at + 1) * size
        with self._mapping:
            value = self._file(self.file_of(name)).view(begin, end, dtype)
        if source.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        return value.reshape(source.shape)

    def close(self) -> None:
        """Let go of the files; views that are still held keep theirs."""
        for file in self._mapped.values():
            file.close()
        self._mapped.clear()

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, path: Path) -> _MappedFile:
        if path not in self._mapped:
            try:
                self._mapped[path] = _MappedFile(path)
            except (OSError, ValueError) as error:
                raise self._damaged(path, str(error)) from None
        return self._mapped[path]

    @staticmethod
    def _damaged(path: Path, what: str) -> ConfigurationError:
        return ConfigurationError(
            f"Cannot read {path}: {what}",
            field="model.path",
            value=str(path),
            allowed="an undamaged safetensors file",
        )


class _MappedFile:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._asked_until = 0

    def view(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return bytes of the file as a vector, without copying where they are aligned."""
        # Asked for before it is reached, so that the disk never waits.
        if end + _READ_AHEAD // 2 > self._asked_until and hasattr(os, "posix_fadvise"):
            start = max(begin, self._asked_until)
            self._asked_until = end + _READ_AHEAD
            length = self._asked_until - start
            os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)
        if begin == end:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            # That a mapped file cannot be written is what is wanted.
            warnings.filterwarnings("ignore", message=".*not writable")
            whole = torch.frombuffer(self._map, dtype=torch.uint8, count=end - begin, offset=begin)
        return (whole if begin % dtype.itemsize == 0 else whole.clone()).view(dtype)

    def close(self) -> None:
        """Close the file; its map goes with the last view of it."""
        os.close(self._descriptor)
