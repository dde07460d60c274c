"""What the journal asks of a store; S3 gives it, and so does this process's memory.

Records in memory are for those who choose to do without a journal (`journal.enabled=false`): the
same code runs on them, and they die with their process.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from typing import Protocol

from serve.config import Settings
from serve.storage import ObjectStore

# About two kilobytes each.
_RECORDS_KEPT = 50_000


class RecordStore(Protocol):
    """Objects by key, with conditional writes; `serve.storage.ObjectStore` says what they do."""

    async def put(
        self, key: str, data: bytes, content_type: str, *, if_absent: bool = False
    ) -> bool:
        """Write an object; False if `if_absent` found one."""

    async def swap(self, key: str, data: bytes, content_type: str, etag: str | None) -> str | None:
        """Write an object unless it has changed; return its new ETag, or None."""

    async def get(self, key: str) -> bytes | None:
        """Return an object's bytes, or None if there is none."""

    async def get_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """Return an object's bytes and ETag, or None if there is none."""

    async def exists(self, key: str) -> bool:
        """Return whether an object of this key exists."""

    async def delete(self, key: str) -> None:
        """Remove an object; none is no error."""

    async def list_keys(self, prefix: str) -> list[str]:
        """Return all keys that start with `prefix`, sorted."""

    async def list_some(self, prefix: str, after: str, most: int) -> list[str]:
        """Return the first keys that start with `prefix` and come after `after`, sorted."""

    async def list_etags(self, prefix: str) -> dict[str, str]:
        """Return key -> ETag of all objects whose keys start with `prefix`."""

    def s3_uri(self, key: str) -> str:
        """Return where an object lies, for people."""


class MemoryStore:
    """Records in this process's memory; of too many the oldest are forgotten.

    Args:
        most: Records that are kept.
    """

    def __init__(self, most: int = _RECORDS_KEPT) -> None:
        self._most = most
        self._objects: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._writes = itertools.count(1)

    async def put(
        self, key: str, data: bytes, content_type: str, *, if_absent: bool = False
    ) -> bool:
        """Write an object; False if `if_absent` found one."""
        if if_absent and key in self._objects:
            return False
        self._write(key, data)
        return True

    async def swap(self, key: str, data: bytes, content_type: str, etag: str | None) -> str | None:
        """Write an object unless it has changed; return its new ETag, or None."""
        known = self._objects.get(key)
        if etag != (None if known is None else known[1]):
            return None
        return self._write(key, data)

    async def get(self, key: str) -> bytes | None:
        """Return an object's bytes, or None if there is none."""
        found = self._objects.get(key)
        return None if found is None else found[0]

    async def get_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """Return an object's bytes and ETag, or None if there is none."""
        return self._objects.get(key)

    async def exists(self, key: str) -> bool:
        """Return whether an object of this key exists."""
        return key in self._objects

    async def delete(self, key: str) -> None:
        """Remove an object; none is no error."""
        self._objects.pop(key, None)

    async def list_keys(self, prefix: str) -> list[str]:
        """Return all keys that start with `prefix`, sorted."""
        return sorted(key for key in self._objects if key.startswith(prefix))

    async def list_some(self, prefix: str, after: str, most: int) -> list[str]:
        """Return the first keys that start with `prefix` and come after `after`, sorted."""
        return heapq.nsmallest(
            most, (key for key in self._objects if key.startswith(prefix) and key > after)
        )

    async def list_etags(self, prefix: str) -> dict[str, str]:
        """Return key -> ETag of all objects whose keys start with `prefix`."""
        return {key: etag for key, (_, etag) in self._objects.items() if key.startswith(prefix)}

    def s3_uri(self, key: str) -> str:
        """Return where an object lies, for people."""
        return f"memory:{key}"

    def _write(self, key: str, data: bytes) -> str:
        etag = str(next(self._writes))
        self._objects[key] = data, etag
        self._objects.move_to_end(key)
        while len(self._objects) > self._most:
            self._objects.popitem(last=False)
        return etag


def record_store(settings: Settings, pictures: ObjectStore) -> RecordStore:
    """Return the store of the journal that these settings mean.

    Args:
        settings: All of them.
        pictures: Their store, which mostly is the journal's as well.
    """
    if not settings.journal.enabled:
        return MemoryStore()
    if settings.journal.storage is None:
        return pictures
    return ObjectStore(settings.journal.storage)
