"""A tenant's jobs, newest first, page by page.

Stores list keys upwards and from a given one on, so each job has a key whose name counts down from
its id: `listing/{tenant}/{countdown}`, and `listing/{tenant}.door/{countdown}` where its door lists
it as well. A page costs one listing of each, of as many keys as it has jobs, however many there
are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from serve.errors import InvalidRequest, KelvinError
from serve.job_ids import is_job_id
from serve.jobs import JobJournal
from serve.listing_keys import job_of, listing_key, listing_prefix
from serve.record_store import RecordStore
from serve.requests import JobPage, JobRecord
from serve.running import RunningJob

LARGEST_PAGE = 100
_log = logging.getLogger("ray.serve")


class JobListing:
    """Reads pages.

    Args:
        records: The journal's store.
        journal: On it.
        live: All jobs of this process, by id.
        durable: Whether jobs outlive it.
    """

    def __init__(
        self,
        records: RecordStore,
        journal: JobJournal,
        live: Mapping[str, RunningJob],
        *,
        durable: bool,
    ) -> None:
        self._records = records
        self._journal = journal
        self._live = live
        self._durable = durable
        self._whose: dict[str, str] = {}  # id of a pending job -> tenant

    async def page(self, tenant: str, limit: int, after: str | None) -> JobPage:
        """Return some of a tenant's jobs, newest first.

        Args:
            tenant: Whose.
            limit: At most so many, from 1 to `LARGEST_PAGE`.
            after: Id of the last job of the page before; None: the first page.

        Raises:
            InvalidRequest: The limit is out of range, or `after` is no job's id.
        """
        if type(limit) is not int or not 1 <= limit <= LARGEST_PAGE:
            raise InvalidRequest(
                "A page cannot have so many jobs.",
                field="limit",
                value=limit,
                allowed=f"an integer from 1 to {LARGEST_PAGE}",
            )
        if after is not None and not is_job_id(after):
            raise InvalidRequest(
                "Jobs are listed from a job on, and this is no job's id.",
                field="after",
                value=after,
                allowed="`next` of the page before",
            )
        lists = await asyncio.gather(
            *(self._listed(tenant, limit, after, by_door=by_door) for by_door in (False, True))
        )
        found = {job for keys in lists for key in keys if (job := job_of(key)) is not None}
        ids = sorted(found, reverse=True)[:limit]
        records = await asyncio.gather(*map(self._record, ids))
        may_go_on = len(ids) == limit or any(len(keys) == limit for keys in lists)
        return JobPage(
            jobs=tuple(each for each in records if each is not None and each.tenant == tenant),
            next=ids[-1] if may_go_on and ids else None,
        )

    async def under_way(self, tenant: str) -> list[JobRecord]:
        """Return a tenant's jobs that have not ended, oldest first, however many ended since."""
        pending = await self._journal.pending()
        ids = [job for job in pending if self._whose.get(job, tenant) == tenant]
        found = [each for each in await asyncio.gather(*map(self._record, ids)) if each is not None]
        # Whose another process's job is does not change, and to ask takes five questions.
        whose = self._whose | {record.id: record.tenant for record in found}
        self._whose = {job: whose[job] for job in pending if job in whose}
        return [record for record in found if record.tenant == tenant and not record.is_over]

    async def _listed(
        self, tenant: str, limit: int, after: str | None, *, by_door: bool
    ) -> list[str]:
        beyond = "" if after is None else listing_key(after, tenant, by_door=by_door)
        prefix = listing_prefix(tenant, by_door=by_door)
        return await self._records.list_some(prefix, beyond, limit)

    async def _record(self, job_id: str) -> JobRecord | None:
        """Return a job; None: it was deleted, never accepted, or is not to be read."""
        live = self._live.get(job_id)
        if live is not None and not live.is_decided:
            return live.record("running", durable=self._durable)
        try:
            ended = await self._journal.ended(job_id)
            if ended is not None or not await self._journal.is_pending(job_id):
                return ended
            return await self._journal.read(job_id)
        except KelvinError as error:
            # One record that cannot be read hides no others.
            _log.warning("Job %s is not listed: %s", job_id, error)
            return None
