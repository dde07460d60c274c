"""Jobs that nobody works on any more are found and taken over.

A job is an orphan if it is pending and the Pipeline that claimed it last has no lease. Whoever
finds a lease stale ends it first, so that its owner knows. Orphans are taken oldest first, few at a
time and one conditional put each; new requests keep their room. Where a model has no room its other
orphans wait behind the first, and those of other models do not. What Pipelines keep dying with
comes later: `serve.relapses`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from time import monotonic

from serve.adoption import Adoption
from serve.claims import Claim, Claims
from serve.custody import Custody
from serve.errors import (
    KelvinError,
    ModelLoading,
    ModelNotFound,
    Overloaded,
    RecordUnreadable,
    StageUnavailable,
    StorageUnavailable,
)
from serve.jobs import JobJournal
from serve.lease_store import LeaseStore
from serve.leases import LeaseWatch
from serve.relapses import Relapses
from serve.requests import JobRecord

_log = logging.getLogger("ray.serve")

_LOOKS_PER_LEASE = 4
# Pending jobs are listed when a lease has ended; and this often in any case, for what was missed.
_LEASES_BETWEEN_LISTINGS = 4
# Of pending jobs whose owner is not known yet, in one look: two requests each.
_OWNERS_AT_ONCE = 16
_OWNERS_PER_LOOK = 256
_TRIES_PER_LOOK = 64
_WAITS_FOR_MODEL_S = 300.0


class Takeover:
    """Looks for orphans.

    Args:
        hands: Where they go.
        journal: Whose jobs.
        claims: To them.
        leases: Of all Pipelines.
        custody: Of this process's own lease.
        lease_s: The same for all Pipelines of one journal.
    """

    def __init__(
        self,
        hands: Adoption,
        journal: JobJournal,
        claims: Claims,
        leases: LeaseStore,
        custody: Custody,
        lease_s: float,
    ) -> None:
        self._hands = hands
        self._journal = journal
        self._claims = claims
        self._leases = leases
        self._custody = custody
        self._lease_s = lease_s
        self._watch = LeaseWatch(lease_s)
        self._alive: set[str] | None = None
        self._owners: dict[str, Claim] = {}
        self._orphans: deque[str] = deque()
        self._missed: dict[str, float] = {}
        self._models: dict[str, str | None] = {}  # as orphans' requests name them
        self._relapses = Relapses(lease_s)
        self._list_at = float("-inf")
        self._wake = asyncio.Event()

    def list_soon(self) -> None:
        """Say that there may be orphans that nobody's lease tells of."""
        self._list_at = float("-inf")

    def wake(self) -> None:
        """Say that there is room again."""
        if self._orphans:
            self._wake.set()

    async def run(self) -> None:
        """Look for orphans until cancelled."""
        failing = False
        while True:
            try:
                await self.look()
                failing = False
            except KelvinError as error:
                if not failing:
                    _log.warning("Jobs of dead Pipelines cannot be looked for: %s", error)
                failing = True
            except Exception:
                _log.exception("Looking for jobs of dead Pipelines failed unforeseen.")
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), self._lease_s / _LOOKS_PER_LEASE)
            except TimeoutError:
                continue

    async def look(self) -> None:
        """Look once: end stale leases, find orphans, take those there is room for.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        await self._end_stale_leases()
        if monotonic() >= self._list_at:
            await self._find_orphans()
        full: set[str | None] = set()
        tries = 0
        for job_id in list(self._orphans):
            if not self._custody.is_held or not self._hands.may_take:
                return
            if job_id in self._models and self._models[job_id] in full:
                continue
            if tries == _TRIES_PER_LOOK:
                break
            tries += 1
            try:
                is_settled = await self._take(job_id)
            except Overloaded:
                full.add(self._models[job_id])
                self._hands.waits_for(full)
                continue
            except StorageUnavailable:
                raise
            except Exception:
                # It must not hold up all that are behind it.
                _log.exception("Job %s was not taken over for a reason nobody foresaw.", job_id)
                is_settled = False
            self._orphans.remove(job_id)
            if not is_settled:
                self._orphans.append(job_id)
        self._hands.waits_for(full, none_else=True)

    async def _end_stale_leases(self) -> None:
        asked = monotonic()
        etags = await self._leases.etags()
        stale = self._watch.observe(etags, asked, monotonic())
        alive = set(etags)
        for name, etag in stale.items():
            if name != self._custody.name and await self._leases.end(name, etag):
                _log.warning("Pipeline %s has died: its jobs are taken over.", name)
                alive.discard(name)
        if self._alive is not None and self._alive - alive:
            self._list_at = float("-inf")
        self._alive = alive

    async def _find_orphans(self) -> None:
        self._list_at = monotonic() + _LEASES_BETWEEN_LISTINGS * self._lease_s
        foreign = [job for job in await self._journal.pending() if not self._hands.holds(job)]
        self._owners = {job: self._owners[job] for job in foreign if job in self._owners}
        self._missed = {job: since for job, since in self._missed.items() if job in self._owners}
        self._models = {job: name for job, name in self._models.items() if job in self._owners}
        self._relapses.keep(self._owners)
        unknown = [job for job in foreign if job not in self._owners]
        for begin in range(0, len(unknown[:_OWNERS_PER_LOOK]), _OWNERS_AT_ONCE):
            some = unknown[begin : begin + _OWNERS_AT_ONCE]
            claims = await asyncio.gather(*map(self._claims.newest, some))
            self._owners.update(zip(some, claims, strict=True))
        if len(unknown) > _OWNERS_PER_LOOK:
            self._list_at = float("-inf")
        # After the claims: who claimed a job had a lease then.
        alive = set(await self._leases.etags()) - {self._custody.name}
        self._orphans = deque(
            job for job in foreign if job in self._owners and self._owners[job].owner not in alive
        )

    async def _take(self, job_id: str) -> bool:
        """Deal with one orphan; False: it has to wait.

        Raises:
            Overloaded: There is no room for it.
        """
        if self._hands.holds(job_id):
            return True
        attempts = self._owners[job_id].attempt
        if not self._relapses.may_start(job_id, attempts, self._hands.live_ids, monotonic()):
            return False
        try:
            record = await self._journal.read(job_id)
        except RecordUnreadable as error:
            await self._park(JobRecord(id=job_id, status="failed", error=error.body()))
            return True
        if record is None or record.is_over:
            await self._journal.forget_pending(job_id)
            return True
        if record.request is None:
            return True  # never written so
        self._models[job_id] = record.request.model
        try:
            resolved = await self._hands.resolved(record.request)
        except (Overloaded, StorageUnavailable):
            raise
        except KelvinError as error:
            if self._may_pass(job_id, error):
                return False
            await self._park(record.model_copy(update={"status": "failed", "error": error.body()}))
            return True
        mine = await self._custody.holding()
        claim = await self._claims.take(job_id, self._owners[job_id], mine)
        if claim is None:
            # Another Pipeline has it. If that one dies too, the next listing says so.
            self._owners[job_id] = await self._claims.newest(job_id)
            return True
        self._owners[job_id] = claim
        self._relapses.started(job_id, attempts)
        self._hands.adopt(job_id, resolved, record.tenant)
        return True

    def _may_pass(self, job_id: str, error: KelvinError) -> bool:
        """Return whether to wait: after a restart a model comes later than the Pipeline."""
        if isinstance(error, ModelNotFound):
            first = self._missed.setdefault(job_id, monotonic())
            return monotonic() - first < _WAITS_FOR_MODEL_S
        return isinstance(error, ModelLoading | StageUnavailable)

    async def _park(self, record: JobRecord) -> None:
        _log.warning("Job %s cannot be done and ends with its error.", record.id)
        await self._journal.publish(record.id, record)
