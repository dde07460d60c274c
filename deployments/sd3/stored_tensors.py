"""The safetensors files of one model component, as one set of named tensors.

Reads `X.safetensors` or `X.safetensors.index.json` with its shards. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve.errors import ConfigurationError

_STEMS = ("diffusion_pytorch_model", "model")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigurationError: The file is missing or no JSON object.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"Cannot read {path}: {error}", field="model.path", value=str(path)
        ) from None
    if not isinstance(loaded, dict):
        raise ConfigurationError(
            f"{path} is not a JSON object.", field="model.path", value=str(path)
        )
    return loaded


class StoredTensors:
    """Opens a component's files; tensors are read one by one, so memory holds each only once.

    Args:
        folder: Such as `MODEL/transformer`.

    Raises:
        ConfigurationError: No safetensors files, a missing or damaged shard, a broken index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._exit = ExitStack()
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        try:
            for path, names in _files(folder):
                self._open(path, names)
        except BaseException:
            self.close()
            raise

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._file_of)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor to the host, as stored.

        Raises:
            ConfigurationError: The data cannot be read.
        """
        try:
            tensor: Tensor = self._handles[name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(self._file_of[name], error) from None
        return tensor

    def close(self) -> None:
        """Close the files."""
        self._exit.close()

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, path: Path, promised: set[str] | None) -> None:
        try:
            handle = self._exit.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise self._damaged(path, error) from None
        present = set(handle.keys())
        if promised is not None and (absent := sorted(promised - present)):
            raise ConfigurationError(
                f"{path} lacks tensor {absent[0]!r} that the index says it holds.",
                field="model.path",
                value=str(path),
            )
        for name in present:
            if name in self._file_of:
                raise ConfigurationError(
                    f"Tensor {name!r} is both in {self._file_of[name]} and in {path}.",
                    field="model.path",
                    value=str(path),
                )
            self._handles[name] = handle
            self._file_of[name] = path

    @staticmethod
    def _damaged(path: Path, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"Cannot read {path}: {error}",
            field="model.path",
            value=str(path),
            allowed="an undamaged safetensors file",
        )


def _files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    for stem in _STEMS:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return _indexed(index)
        if (single := folder / f"{stem}.safetensors").is_file():
            return [(single, None)]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return [(others[0], None)]
    found = ", ".join(path.name for path in others) or "none"
    raise ConfigurationError(
        f"{folder} has no weights to load (safetensors files there: {found}).",
        field="model.path",
        value=str(folder),
        allowed="model.safetensors or diffusion_pytorch_model.safetensors, whole or with an index",
    )


def _indexed(index: Path) -> list[tuple[Path, set[str] | None]]:
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
    return [(index.parent / file, names) for file, names in sorted(shards.items())]
