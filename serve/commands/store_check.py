"""Whether the object store does what Kelvin needs of it: the real one, or a brief embedded one."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from serve.commands.finding import Finding
from serve.config import Settings, StorageSettings
from serve.errors import KelvinError


def uses_embedded_store(settings: Settings) -> bool:
    """Tell whether these settings mean the SeaweedFS that Kelvin starts itself."""
    return settings.storage.endpoint_url is None and settings.embedded_store.enabled


def check_store(settings: Settings) -> list[Finding]:
    """Report whether the store is reachable, writable and honours conditional puts.

    Where the embedded store is meant, one is started for the moment in a temporary folder: this
    proves that it works on this machine and never touches a running one's data.
    """
    try:
        if not uses_embedded_store(settings):
            return _probe(settings.storage)
        from serve.embedded_store import EmbeddedStore

        with (
            tempfile.TemporaryDirectory(prefix="kelvin-doctor-") as folder,
            EmbeddedStore(Path(folder), settings.storage.bucket) as store,
        ):
            return _probe(store.storage_settings(settings.storage))
    except KelvinError as error:
        return [Finding("store", "failed", error.message, error.allowed or "see storage settings")]


def _probe(storage: StorageSettings) -> list[Finding]:
    from serve.storage import ObjectStore

    store = ObjectStore(storage)
    try:
        checks = asyncio.run(store.probe())
    finally:
        store.close()
    return [
        Finding(
            f"store: {check.name}",
            "ok" if check.ok else "failed",
            check.detail,
            check.remedy or "",
        )
        for check in checks
    ]
