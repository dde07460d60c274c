"""Where the records of API keys lie: in the journal's store, or in one file on this machine.

    keys/{SHA-256 of the key}.json    put if absent

The file is for the embedded store, which runs only while Kelvin does, and for who keeps keys apart.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from serve.config import Settings
from serve.errors import ConfigurationError
from serve.keys import KeyRecord
from serve.record_store import RecordStore
from serve.storage import ObjectStore

_log = logging.getLogger("ray.serve")
_PREFIX = "keys/"
_SUFFIX = ".json"
KEYS_FILE = "keys.json"
"""In the embedded store's folder."""
_READ_AT_ONCE = 16


class KeyStore(Protocol):
    """Records of keys by digest. Every method raises KelvinError where they cannot be reached."""

    async def records(self) -> Mapping[str, KeyRecord]:
        """Return digest -> record of every key that counts."""

    async def add(self, record: KeyRecord) -> None:
        """Let a key count from now on."""

    async def remove(self, digest: str) -> None:
        """Let a key count no more; an unknown one is no error."""


class ObjectKeys:
    """Keys in an object store: one listing tells whether anything has changed.

    Args:
        store: The journal's.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._read: dict[str, tuple[str, KeyRecord | None]] = {}  # object -> its ETag, record

    async def records(self) -> Mapping[str, KeyRecord]:
        """Return digest -> record; an object that is no record of its key counts as none."""
        etags = await self._store.list_etags(_PREFIX)
        changed = [key for key, etag in etags.items() if self._read.get(key, ("",))[0] != etag]
        for begin in range(0, len(changed), _READ_AT_ONCE):
            some = changed[begin : begin + _READ_AT_ONCE]
            for key, data in zip(
                some, await asyncio.gather(*map(self._store.get, some)), strict=True
            ):
                self._read[key] = etags[key], None if data is None else _parsed(key, data)
        self._read = {key: found for key, found in self._read.items() if key in etags}
        return {record.digest: record for _, record in self._read.values() if record is not None}

    async def add(self, record: KeyRecord) -> None:
        """Let a key count from now on."""
        data = record.model_dump_json().encode()
        await self._store.put(_object(record.digest), data, "application/json", if_absent=True)

    async def remove(self, digest: str) -> None:
        """Let a key count no more; an unknown one is no error."""
        await self._store.delete(_object(digest))


class FileKeys:
    """Keys in one JSON file, digest -> record, for its owner's eyes only.

    Args:
        path: Made with the first key.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path).expanduser()

    async def records(self) -> Mapping[str, KeyRecord]:
        """Return digest -> record.

        Raises:
            ConfigurationError: The file cannot be read.
        """
        return await asyncio.to_thread(self._load)

    async def add(self, record: KeyRecord) -> None:
        """Let a key count from now on.

        Raises:
            ConfigurationError: The file cannot be read or written.
        """
        await asyncio.to_thread(self._change, record.digest, record)

    async def remove(self, digest: str) -> None:
        """Let a key count no more; an unknown one is no error.

        Raises:
            ConfigurationError: The file cannot be read or written.
        """
        await asyncio.to_thread(self._change, digest, None)

    def _load(self) -> dict[str, KeyRecord]:
        try:
            content = json.loads(self._path.read_bytes())
            found = {digest: KeyRecord.model_validate(each) for digest, each in content.items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._unusable(error.strerror or "unreadable") from None
        except (ValueError, AttributeError):
            raise self._unusable("not written by Kelvin") from None
        return {digest: record for digest, record in found.items() if record.digest == digest}

    def _change(self, digest: str, record: KeyRecord | None) -> None:
        try:
            with self._locked():
                records = self._load()
                records.pop(digest, None)
                if record is not None:
                    records[digest] = record
                content = {name: each.model_dump() for name, each in records.items()}
                # mkstemp's file is readable by its owner alone.
                handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".keys-")
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path)
        except OSError as error:
            raise self._unusable(error.strerror or "not writable") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._path.with_name(self._path.name + ".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _unusable(self, why: str) -> ConfigurationError:
        return ConfigurationError(
            f"The file of API keys cannot be used: {why}.",
            field="keys.file",
            value=str(self._path),
            allowed="a file that `kelvin keys` writes, readable by the service on each node",
        )


def key_store(settings: Settings) -> KeyStore:
    """Return where the keys of a service with these settings lie."""
    if settings.keys.file is not None:
        return FileKeys(settings.keys.file)
    if settings.uses_embedded_store:
        return FileKeys(Path(settings.embedded_store.data_dir) / KEYS_FILE)
    # A store of its own beside the Pipeline's: who is asked for a key waits for no picture.
    return ObjectKeys(ObjectStore(settings.journal.storage or settings.storage))


def _object(digest: str) -> str:
    return f"{_PREFIX}{digest}{_SUFFIX}"


def _parsed(key: str, data: bytes) -> KeyRecord | None:
    try:
        record = KeyRecord.model_validate_json(data)
    except ValidationError:
        record = None
    if record is None or _object(record.digest) != key:
        _log.warning("The record of an API key cannot be read and counts for nothing: %s", key)
        return None
    return record
