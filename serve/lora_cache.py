"""LoRAs in the object store, downloaded when they are first asked for.

They come and are kept as models do (`serve.model_cache`), in a cache of their own: each checked by
the store's checksum, once a node, and the longest unused go. What changes in the store has another
ETag, and so is another file here.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from serve.config import StorageSettings
from serve.errors import ConfigurationError, InvalidRequest, StorageUnavailable
from serve.lora_choice import SUFFIX
from serve.lora_settings import LoraSettings
from serve.model_cache.node_cache import NodeCache
from serve.model_cache.node_copy import copied
from serve.model_cache.remote_files import RemoteFile, Source
from serve.model_cache.transfer import Transfer
from serve.user_cache import user_cache

_LISTED_AGAIN_S = 10.0
_LISTED_AGAIN_FOR_UNKNOWN_S = 1.0
_KEPT_S = 60.0  # since its last use: whoever was told where it is reads it well before
_MOST_BYTES = 8 << 30  # of one file; rank 256 of every layer of Large is 1.7 GiB
_CONNECTIONS = 16  # ranges that are read at once
_FILE = "lora" + SUFFIX


@dataclass(frozen=True)
class Downloaded:
    """A file of the cache."""

    path: Path
    version: str


class LoraCache:
    """LoRAs below a prefix of the store. Blocks; thread-safe.

    Args:
        storage: Where they are.
        prefix: Of their keys, below the store's own.
        settings: Where downloads go, and how many bytes of them are kept.
    """

    def __init__(self, storage: StorageSettings, prefix: str, settings: LoraSettings) -> None:
        self._folder = Path(settings.cache_dir or user_cache() / "loras").expanduser()
        self._cache = NodeCache(self._folder, settings.cache_mib << 20, kept_s=_KEPT_S)
        source = Source(storage.bucket, f"{storage.prefix}{prefix}".rstrip("/"))
        self._transfer = Transfer(storage, source, connections=_CONNECTIONS, names_settings=False)
        self._place = f"{storage.endpoint_url or ''} {source}"
        self._lock = threading.Lock()
        self._listed: dict[str, RemoteFile] = {}
        self._listed_at = float("-inf")

    def names(self) -> list[str]:
        """Return what the store has.

        Raises:
            StorageUnavailable: It does not answer.
        """
        return sorted(self._files())

    def find(self, name: str) -> Downloaded | None:
        """Return a file, downloaded if it is not there yet; None if the store has none.

        Args:
            name: Without prefix and suffix.

        Raises:
            InvalidRequest: It is absurdly large.
            StorageUnavailable: The store does not answer, or the cache cannot take it.
        """
        found = self._files().get(name) or self._files(_LISTED_AGAIN_FOR_UNKNOWN_S).get(name)
        if found is None:
            return None
        file, is_looked_at = found, False

        def look() -> list[RemoteFile]:
            nonlocal file, is_looked_at
            if is_looked_at:  # it has changed while it was read
                file = self._files(0.0).get(name, file)
            is_looked_at = True
            if file.size > _MOST_BYTES:
                raise InvalidRequest(
                    f"LoRA {name!r} has more than {_MOST_BYTES >> 30} GiB.",
                    field="loras",
                    value=name,
                    allowed="a LoRA of a size that LoRAs have",
                )
            return [file]

        try:
            folder = copied(self._cache, self._place, "lora", self._transfer, look)
        except ConfigurationError as error:
            raise StorageUnavailable(
                f"LoRA {name!r} does not come to this node. {error.message}",
                field="lora.cache_dir",
                value=str(self._folder),
                allowed="a folder that this process may write to, with room by lora.cache_mib, and"
                " whole objects that nobody replaces meanwhile",
            ) from error
        uri = f"s3://{self._transfer.source.bucket}/{file.key}"
        version = hashlib.sha256(f"{uri}\0{file.etag}".encode()).hexdigest()[:32]
        return Downloaded(folder / _FILE, version)

    def _files(self, max_age_s: float = _LISTED_AGAIN_S) -> dict[str, RemoteFile]:
        with self._lock:
            if time.monotonic() - self._listed_at > max_age_s:
                below = self._transfer.source.below
                self._listed = {
                    key.removeprefix(below).removesuffix(SUFFIX): RemoteFile(_FILE, key, size, etag)
                    for key, size, etag in self._transfer.listing()
                    if key.endswith(SUFFIX)
                }
                self._listed_at = time.monotonic()
            return self._listed
