"""The tensors of one file, of a sharded folder, or of several files, as one set of names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.checkpoints.header import Header, StoredTensor, read_header
from serve.errors import ConfigurationError

_STEMS = ("diffusion_pytorch_model", "model")
_LARGEST_JSON = 16 << 20
_LARGEST_SMALL = 1 << 20


@dataclass(frozen=True)
class TensorFiles:
    """Names that are unique over all files, and which file holds each.

    Attributes:
        headers: Of the files, in order.
        tensors: Name -> where it lies in its file.
        file_of: Name -> its file.
    """

    headers: tuple[Header, ...]
    tensors: Mapping[str, StoredTensor]
    file_of: Mapping[str, Path]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> TensorFiles:
        """Read the headers of files.

        Raises:
            ConfigurationError: A file is no safetensors file, or two hold the same name.
        """
        headers = tuple(read_header(path) for path in paths)
        tensors: dict[str, StoredTensor] = {}
        file_of: dict[str, Path] = {}
        for header in headers:
            for name, tensor in header.tensors.items():
                if name in file_of:
                    raise ConfigurationError(
                        f"Tensor {name!r} is both in {file_of[name]} and in {header.path}.",
                        field="model.path",
                        value=str(header.path),
                    )
                tensors[name], file_of[name] = tensor, header.path
        return cls(headers, tensors, file_of)

    @classmethod
    def of_folder(cls, folder: Path) -> TensorFiles:
        """Read a component of a Diffusers directory: one file, or an index and its shards.

        Raises:
            ConfigurationError: No weights, a missing or damaged shard, a broken index.
        """
        promised = shards_of(folder)
        found = cls.of(promised)
        for path, names in promised.items():
            held = {name for name, file in found.file_of.items() if file == path}
            if absent := sorted(names - held):
                raise ConfigurationError(
                    f"{path} lacks tensor {absent[0]!r} that the index says it holds.",
                    field="model.path",
                    value=str(path),
                )
        return found

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the files."""
        return tuple(header.path for header in self.headers)

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(header.size for header in self.headers)

    def metadata(self, key: str) -> str | None:
        """Return what the first file that says anything about a key says."""
        return next((h.metadata[key] for h in self.headers if key in h.metadata), None)

    def read_small(self, name: str) -> bytes:
        """Return the bytes of a tensor that is a note rather than a weight.

        Raises:
            ConfigurationError: It is larger than a mebibyte, or cannot be read.
        """
        tensor, path = self.tensors[name], self.file_of[name]
        if tensor.end - tensor.begin > _LARGEST_SMALL:
            raise ConfigurationError(
                f"Tensor {name!r} in {path} is {tensor.end - tensor.begin:,} bytes; a note of at"
                f" most {_LARGEST_SMALL:,} was expected.",
                field="model.path",
                value=name,
            )
        try:
            with path.open("rb") as stream:
                stream.seek(tensor.begin)
                return stream.read(tensor.end - tensor.begin)
        except OSError as error:
            raise ConfigurationError(
                f"Cannot read {path}: {error}", field="model.path", value=str(path)
            ) from None


def shards_of(folder: Path) -> dict[Path, set[str]]:
    """Return a component's files, each with the names that an index promises of it.

    Raises:
        ConfigurationError: There are no weights, or the index is broken or reaches elsewhere.
    """
    for stem in _STEMS:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return _indexed(index)
        if (single := folder / f"{stem}.safetensors").is_file():
            return {single: set()}
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return {others[0]: set()}
    found = ", ".join(path.name for path in others) or "none"
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".ckpt"))
    beside = f"; {pickles[0]} is a pickle and is not read" if pickles else ""
    raise ConfigurationError(
        f"{folder} has no weights to load (safetensors files there: {found}{beside}).",
        field="model.path",
        value=str(folder),
        allowed="model.safetensors or diffusion_pytorch_model.safetensors, whole or with an index",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigurationError: The file is missing, absurdly large or no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"larger than {_LARGEST_JSON:,} bytes")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"Cannot read {path}: {error}", field="model.path", value=str(path)
        ) from None
    if not isinstance(loaded, dict):
        raise ConfigurationError(
            f"{path} is not a JSON object.", field="model.path", value=str(path)
        )
    return loaded


def _indexed(index: Path) -> dict[Path, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigurationError(
            f"{index} has no weight_map.", field="model.path", value=str(index)
        )
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A shard is a plain name beside its index: an index must not reach elsewhere.
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigurationError(
                f"{index} names a shard {file!r} that is not beside it.",
                field="model.path",
                value=str(index),
            )
        shards.setdefault(file, set()).add(name)
    return {index.parent / file: names for file, names in sorted(shards.items())}
