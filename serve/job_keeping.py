"""What keeps the jobs of one Pipeline safe: its lease, its claims, and an eye on everybody else's.

The lease and the watch have a client of their own, with short timeouts: neither a store that hangs
nor sixteen large uploads may keep a living process from saying that it lives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from serve.adoption import Adoption
from serve.claims import Claims
from serve.config import Settings, StorageSettings
from serve.custody import Custody
from serve.detached import detached_context
from serve.errors import StorageUnavailable
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.lease_store import LeaseStore
from serve.leases import RENEWALS_PER_LEASE
from serve.record_store import RecordStore
from serve.storage import ObjectStore
from serve.takeover import Takeover
from serve.uploads import Uploads

_log = logging.getLogger("ray.serve")
_RECLAIM_PAUSE_S = 0.5
_SHORTEST_TIMEOUT_S = 1.0


class JobKeeping:
    """Keeps one Pipeline's lease and takes over from others.

    Args:
        jobs: Of this process.
        settings: Section `journal`.
        store: Of leases and claims.
        journal: Of all Pipelines.
        uploads: Of finished pictures.
        facts: About this process, for people who look into the store.
    """

    def __init__(
        self,
        jobs: Adoption,
        settings: JournalSettings,
        store: RecordStore,
        journal: JobJournal,
        uploads: Uploads,
        facts: Mapping[str, Any],
    ) -> None:
        lease_s = settings.lease_s
        self._jobs = jobs
        self._settings = settings
        self._journal = journal
        self._uploads = uploads
        self._claims = Claims(store, journal)
        leases = LeaseStore(store)
        self.custody = Custody(leases, lease_s, facts, self._began_anew)
        self._takeover = Takeover(jobs, journal, self._claims, leases, self.custody, lease_s)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to keep the lease and to look for orphans; calling it again does nothing."""
        if self._tasks:
            return
        if not self._settings.enabled:
            _log.warning(
                "Durable jobs are off (journal.enabled=false): a job dies with this process."
            )
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self.custody.run(), name="lease", context=detached_context()),
            loop.create_task(self._takeover.run(), name="takeover", context=detached_context()),
            loop.create_task(
                self._uploads.tidy(self._journal, self._jobs.live_ids),
                name="spool",
                context=detached_context(),
            ),
        ]

    async def owner(self) -> str:
        """Return the lease under which a job may be accepted.

        Raises:
            StorageUnavailable: There is none now.
        """
        self.start()
        return await self.custody.holding()

    async def release(self) -> None:
        """End the lease and look for no orphans any more: what lives here is everybody's."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self.custody.release()
        except StorageUnavailable as error:
            _log.warning("The lease is left to expire: %s", error)

    def as_json(self) -> dict[str, Any]:
        """Return what `/v1/status` says of the journal."""
        storage = self._settings.storage
        return {
            "durable": self._settings.enabled,
            "bucket": None if storage is None else storage.bucket,
            "lease": self.custody.name,
            "lease_is_held": self.custody.is_held,
        }

    def may_have_lost_one(self) -> None:
        """Say that a job may be on record which nobody works on."""
        self._takeover.list_soon()

    def room_again(self) -> None:
        """Say that a job has ended."""
        self._takeover.wake()

    async def _began_anew(self, before: str, name: str) -> None:
        """Claim again, under the new lease, what nobody has taken meanwhile; give up the rest."""
        for job in self._jobs.live:
            # One that is being written down has no claim yet, and gets the new name.
            while job.is_started and not job.is_over and not job.is_given_up:
                try:
                    newest = await self._claims.newest(job.id)
                    if newest.owner != name and not (
                        newest.owner in (before, None)
                        and await self._claims.take(job.id, newest, name)
                    ):
                        job.give_up()
                    break
                except StorageUnavailable:
                    await asyncio.sleep(_RECLAIM_PAUSE_S)
        # Whoever took the rest may have died since.
        self._takeover.list_soon()


def lease_store(settings: Settings, records: RecordStore) -> RecordStore:
    """Return the store of leases and claims: the journal's, by a client of its own."""
    if not settings.journal.enabled:
        return records
    storage = settings.journal.storage or settings.storage
    return ObjectStore(_quick(storage, settings.journal.lease_s))


def _quick(storage: StorageSettings, lease_s: float) -> StorageSettings:
    each_s = max(_SHORTEST_TIMEOUT_S, lease_s / RENEWALS_PER_LEASE)
    return storage.model_copy(
        update={
            "connect_timeout_s": min(storage.connect_timeout_s, each_s),
            "read_timeout_s": min(storage.read_timeout_s, each_s),
            "max_attempts": 1,
        }
    )
