"""How a node's cache stays within its bound: what was not used for longest goes, nothing in use."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from serve.errors import ConfigurationError

GIB = 1 << 30
PART = ".part"
"""In the name of a file that is on its way; whoever writes it holds its lock."""
_log = logging.getLogger("ray.serve")


class Room:
    """Of one folder, laid out as `serve.model_cache.node_cache` says.

    Args:
        root: The folder.
        most_bytes: Of all files.
        kept_s: That a model stays after its last use, though nobody holds it.
    """

    def __init__(self, root: Path, most_bytes: int, kept_s: float) -> None:
        self._root = root
        self._most_bytes = most_bytes
        self._kept_s = kept_s

    def make(self, model: str, files: set[str], whole: int, needed: int) -> None:
        """Remove what must go for a model's files to come.

        Args:
            model: Which.
            files: Ids of all its files, which stay.
            whole: bytes of them all.
            needed: bytes of those that are not here.

        Raises:
            ConfigurationError: The cache is too small for it, or for it and what is in use.
        """
        if whole > self._most_bytes:
            raise self.lacking(f"{whole / GIB:.2f} GiB are to come.", whole)
        records = (self._root / "models").glob("*.json")
        others = sorted((each for each in records if each.stem != model), key=changed_at)
        while (held := self._sweep(files)) + needed > self._most_bytes:
            # Their locks show which of them somebody uses.
            if not any(self._removed(record) for record in others):
                raise self.lacking(
                    f"{held / GIB:.2f} GiB of the cache are in use, and {needed / GIB:.2f} GiB more"
                    " are needed.",
                    whole,
                )

    def lacking(self, why: str, whole: int) -> ConfigurationError:
        """Return the error of files that find no room.

        Args:
            why: In a sentence.
            whole: bytes of all of them.
        """
        return ConfigurationError(
            f"{why} The files take {whole / GIB:.2f} GiB, the cache at most"
            f" {self._most_bytes / GIB:.2f} GiB.",
            field="model.source.cache_gib",
            value=round(self._most_bytes / GIB, 3),
            allowed="room for all models of this node's replicas, in model.source.cache_gib and on"
            " the disk of model.source.cache_dir",
        )

    def _removed(self, record: Path) -> bool:
        """Remove a model that nobody uses; False: somebody does or just did, or it is gone."""
        lock = os.open(self._root / "locks" / f"{record.stem}.use", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not record.exists() or time.time() - changed_at(record) < self._kept_s:
                return False
            record.unlink()
            shutil.rmtree(record.with_suffix(""), ignore_errors=True)
            _log.info("Files not used for longest are removed: %s", record.stem)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(lock)

    def _sweep(self, files: set[str]) -> int:
        """Remove files that no model has, but for these; return the bytes of the others."""
        total = 0
        for file in (self._root / "files").iterdir():
            if file.suffix == ".json":
                continue
            with suppress(FileNotFoundError):
                about = file.stat()
                is_left = _is_orphan(file) if PART in file.name else about.st_nlink == 1
                if is_left and file.name not in files:
                    file.with_name(f"{file.name}.json").unlink(missing_ok=True)
                    file.unlink()
                elif file.name not in files or about.st_nlink > 1:
                    total += about.st_size
        return total


def changed_at(path: Path) -> float:
    """Return when a file changed, in seconds of the clock; 0: it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_orphan(part: Path) -> bool:
    """Whether whoever wrote a part is gone."""
    opened = os.open(part, os.O_RDWR)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(opened)
    return True
