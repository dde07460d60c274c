"""Whether the object store does what Kelvin needs of it: the real one, or a brief embedded one."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from serve.commands.finding import Finding
from serve.config import Settings
from serve.errors import KelvinError

DURABLE_JOBS_OFF = Finding(
    "journal", "warning", "durable jobs are off: a job dies with its process", "journal.enabled"
)


def check_store(settings: Settings) -> list[Finding]:
    """Report whether the store is reachable, writable and honours conditional puts.

    Where the embedded store is meant, one is started for the moment in a temporary folder: this
    proves that it works on this machine and never touches a running one's data.
    """
    try:
        if not settings.uses_embedded_store:
            return _probe(settings)
        from serve.embedded_store import EmbeddedStore

        with (
            tempfile.TemporaryDirectory(prefix="kelvin-doctor-") as folder,
            EmbeddedStore(Path(folder), settings.storage.bucket) as store,
        ):
            storage = store.storage_settings(settings.storage)
            return _probe(settings.model_copy(update={"storage": storage}))
    except KelvinError as error:
        return [Finding("store", "failed", error.message, error.allowed or "see storage settings")]


def _probe(settings: Settings) -> list[Finding]:
    from serve.storage_probe import probe_stores

    checks = asyncio.run(probe_stores(settings))
    findings = [
        Finding(
            f"store: {check.name}",
            "ok" if check.ok else "failed",
            check.detail,
            check.remedy or "",
        )
        for check in checks
    ]
    if not settings.journal.enabled:
        findings.append(DURABLE_JOBS_OFF)
    return findings
