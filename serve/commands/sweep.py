"""`kelvin sweep`: remove jobs that ended long ago, and pictures that belong to nothing."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.commands.output import EXIT_OK, console, stdout_is_for_json, write_json
from serve.config import Settings
from serve.errors import ConfigurationError, InvalidRequest

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_AGE = re.compile(r"(\d{1,9})([smhd])")


def sweep(settings: Settings, older_than: str, *, dry_run: bool, as_json: bool) -> int:
    """Sweep the stores of these settings once; Kelvin may be running.

    Raises:
        InvalidRequest: The age cannot be read.
        ConfigurationError: There is no journal to go by.
        StorageUnavailable: A store does not answer.
    """
    from serve.storage import ObjectStore
    from serve.sweep import Sweep

    age_s = seconds_of(older_than)
    if not settings.journal.enabled:
        raise ConfigurationError(
            "Without a journal there is nothing to tell old jobs by.",
            field="journal.enabled",
            value=False,
            allowed="true; or a lifecycle rule of the store on images/",
        )
    with stdout_is_for_json() as stdout, _reachable(settings) as reached:
        pictures = ObjectStore(reached.storage)
        own = reached.journal.storage
        records = pictures if own is None else ObjectStore(own)
        swept = asyncio.run(Sweep(records, pictures, age_s, time.time()).run(dry=dry_run))
        body = {"dry_run": dry_run, **swept.as_json()}
        if as_json:
            write_json(body, stdout)
    words = "Would remove" if dry_run else "Removed"
    console().print(
        f"{words} {swept.jobs} jobs older than {older_than} with {swept.pictures_of_jobs} "
        f"pictures, {swept.unreferenced_pictures} pictures of no job, {swept.uploads} uploads, "
        f"{swept.comfyui_records} records of ComfyUI prompts, "
        f"{swept.idempotency_keys} idempotency keys and {swept.leases} leases: "
        f"{swept.bytes / 2**20:.1f} MiB.",
        soft_wrap=True,
    )
    return EXIT_OK


def seconds_of(age: str) -> float:
    """Return an age such as 30d in seconds.

    Raises:
        InvalidRequest: It is none.
    """
    found = _AGE.fullmatch(age.strip())
    if found is None:
        raise InvalidRequest(
            "The age cannot be read.",
            field="older_than",
            value=age,
            allowed="a whole number and s, m, h or d: 30d",
        )
    return int(found[1]) * _UNITS[found[2]]


@contextmanager
def _reachable(settings: Settings) -> Iterator[Settings]:
    """Yield the settings of stores that answer: the embedded one is started unless it runs."""
    if not settings.uses_embedded_store:
        yield settings
        return
    from serve.embedded_store import EmbeddedStore

    data_dir = Path(settings.embedded_store.data_dir)
    if not data_dir.is_dir():
        raise ConfigurationError(
            "The embedded store has no data here.",
            field="embedded_store.data_dir",
            value=str(data_dir),
            allowed="the folder that `kelvin up` keeps, or an S3 endpoint in storage.endpoint_url",
        )
    store = EmbeddedStore(data_dir, settings.storage.bucket)
    is_running = store.find_running()
    if not is_running:
        store.start()
    try:
        yield settings.model_copy(update={"storage": store.storage_settings(settings.storage)})
    finally:
        if not is_running:
            store.stop()
