"""LoRAs in the object store, downloaded when they are first asked for.

A file's name in the cache holds its ETag, so what changes in the store is another file here, and a
file that is there is whole: it is written under another name and moved. Processes of one node may
share a cache; whoever deletes takes the longest unused, never what was used in the last minutes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from serve.errors import InvalidRequest, StorageUnavailable
from serve.lora_choice import SUFFIX
from serve.lora_settings import LoraSettings
from serve.storage import ObjectStore

_LISTED_AGAIN_S = 10.0
_LISTED_AGAIN_FOR_UNKNOWN_S = 1.0
_KEPT_S = 600.0  # since its last use: whoever was told where it is reads it well before
_MOST_BYTES = 8 << 30  # of one file; rank 256 of every layer of Large is 1.7 GiB


@dataclass(frozen=True)
class Downloaded:
    """A file of the cache."""

    path: Path
    version: str


class LoraCache:
    """LoRAs below a prefix of the store. Blocks; thread-safe.

    Args:
        store: Where they are.
        prefix: Of their keys.
        settings: Where downloads go, and how many bytes of them are kept.
    """

    def __init__(self, store: ObjectStore, prefix: str, settings: LoraSettings) -> None:
        self._store = store
        self._prefix = prefix
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._folder = Path(settings.cache_dir or home / "kelvin" / "loras").expanduser()
        self._most_bytes = settings.cache_mib << 20
        self._lock = threading.Lock()
        self._listed: dict[str, str] = {}
        self._listed_at = float("-inf")

    def names(self) -> list[str]:
        """Return what the store has.

        Raises:
            StorageUnavailable: It does not answer.
        """
        return sorted(self._etags())

    def find(self, name: str) -> Downloaded | None:
        """Return a file, downloaded if it is not there yet; None if the store has none.

        Args:
            name: Without prefix and suffix.

        Raises:
            InvalidRequest: It is absurdly large.
            StorageUnavailable: The store does not answer, or the cache cannot be written.
        """
        etag = self._etags().get(name) or self._etags(_LISTED_AGAIN_FOR_UNKNOWN_S).get(name)
        if etag is None:
            return None
        key = self._prefix + name + SUFFIX
        uri = self._store.s3_uri(key)
        version = hashlib.sha256(f"{uri}\0{etag}".encode()).hexdigest()[:32]
        path = self._folder / (version + SUFFIX)
        with self._lock:
            if not path.is_file():
                self._download(name, key, path)
            with suppress(OSError):
                os.utime(path)
            self._put_out(path)
        return Downloaded(path, version)

    def _etags(self, max_age_s: float = _LISTED_AGAIN_S) -> dict[str, str]:
        with self._lock:
            if time.monotonic() - self._listed_at > max_age_s:
                found = self._store.list_etags_blocking(self._prefix)
                self._listed = {
                    key.removeprefix(self._prefix).removesuffix(SUFFIX): etag
                    for key, etag in found.items()
                    if key.endswith(SUFFIX)
                }
                self._listed_at = time.monotonic()
            return self._listed

    def _download(self, name: str, key: str, path: Path) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor, part = tempfile.mkstemp(prefix="lora-", suffix=".part", dir=self._folder)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            with os.fdopen(descriptor, "wb") as stream:
                for piece in self._store.pieces(key):
                    stream.write(piece)
                    if stream.tell() > _MOST_BYTES:
                        raise InvalidRequest(
                            f"LoRA {name!r} has more than {_MOST_BYTES >> 30} GiB.",
                            field="loras",
                            value=name,
                            allowed="a LoRA of a size that LoRAs have",
                        )
            os.replace(part, path)
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)

    def _put_out(self, keep: Path) -> None:
        """Delete the longest unused beyond what may be kept."""
        files = []
        for path in self._folder.glob("*" + SUFFIX):
            with suppress(OSError):
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        kept, now = 0, time.time()
        for used, size, path in sorted(files, reverse=True):
            kept += size
            if kept > self._most_bytes and path != keep and now - used > _KEPT_S:
                with suppress(OSError):
                    path.unlink()

    def _unwritable(self, error: OSError) -> StorageUnavailable:
        return StorageUnavailable(
            f"The cache for LoRAs cannot be written: {error.strerror or error}.",
            field="lora.cache_dir",
            value=str(self._folder),
            allowed="a folder with room that this process may write to",
        )
