"""A note in a folder of where its weights lie, in place of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve.checkpoints.part import Part
from serve.checkpoints.tensor_files import TensorFiles, read_json
from serve.errors import ConfigurationError

REFERENCE = "kelvin-weights.json"


def part_in(folder: Path) -> Part:
    """Return the part that a folder holds or, in a view, stands for.

    Raises:
        ConfigurationError: The files are gone, were changed since, or cannot be read.
    """
    if not (folder / REFERENCE).is_file():
        return Part.of(TensorFiles.of_folder(folder))
    noted = read_json(folder / REFERENCE)
    for path, size, modified in noted["files"]:
        stat = Path(path).stat() if Path(path).is_file() else None
        if stat is None or [stat.st_size, stat.st_mtime_ns] != [size, modified]:
            raise ConfigurationError(
                f"{path} has gone or was changed since it was looked at.",
                field="model.path",
                value=str(path),
                allowed="the same file; restart to look at it anew",
            )
    paths = [Path(path) for path, _, _ in noted["files"]]
    return Part.of(TensorFiles.of(paths), noted["prefix"], noted["kind"])


def reference_to(part: Part) -> dict[str, Any]:
    """Return the note of a part, with what tells whether its files are still the same."""
    files = [(path.absolute(), path.stat()) for path in part.files.paths]
    return {
        "kind": part.kind,
        "prefix": part.prefix,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files],
    }
