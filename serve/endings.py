"""How a job ends: done, failed or cancelled, as the journal decides.

Several may want to end one job: its own work, whoever cancels it here or through another Pipeline
process, and later whoever takes it over. The journal's first writer wins, and everybody else
reports what the winner wrote.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from serve.errors import JobCancelled, KelvinError, StorageUnavailable
from serve.jobs import JobJournal
from serve.requests import GenerateResult, JobEvent, JobRecord
from serve.running import RunningJob

_log = logging.getLogger("ray.serve")
_CANCEL_POLL_S = 5.0
_UNFORESEEN = "Internal error; the server's log has the details."


class Maker(Protocol):
    """Makes pictures; `serve.served_models.ServedModels` is one."""

    async def make(self, job: RunningJob) -> GenerateResult:
        """Make and store every picture of a job."""


class Endings:
    """Brings live jobs to their end."""

    def __init__(self, production: Maker, journal: JobJournal) -> None:
        self._production = production
        self._journal = journal

    async def reach(self, job: RunningJob) -> JobEvent:
        """Do the job and publish how it ended; return the event that says so.

        It does not raise: a failure is an end like any other.
        """
        ended: JobRecord | None
        try:
            result = await job.work(self._production.make(job))
            ended = JobRecord(id=job.id, status="succeeded", request=job.request, result=result)
            if not await self._journal.publish(job.id, ended):
                # Somebody else was first: a cancellation, or whoever took the job over.
                ended = await self._journal.read(job.id)
        except asyncio.CancelledError:
            ended = await self._cancelled(job)
        except KelvinError as error:
            ended = await self._failed(job, error)
        except Exception:
            _log.exception("Job %s failed in a way nobody foresaw.", job.id)
            ended = await self._failed(job, KelvinError(_UNFORESEEN))
        if ended is None:
            ended = await self._failed(job, KelvinError("The job's records have been removed."))
        if ended.status == "succeeded":
            job.error = None
        elif ended.status == "cancelled":
            job.error = JobCancelled("The job was cancelled.", field="id", value=job.id)
        return last_event(ended)

    async def _cancelled(self, job: RunningJob) -> JobRecord:
        try:
            return await self._journal.request_cancel(job.id)
        except KelvinError as error:
            _log.warning("Job %s is cancelled, but cannot say so: %s", job.id, error)
            return JobRecord(id=job.id, status="cancelled", request=job.request)

    async def _failed(self, job: RunningJob, error: KelvinError) -> JobRecord:
        job.error = error
        ended = JobRecord(id=job.id, status="failed", request=job.request, error=error.body())
        try:
            if not await self._journal.publish(job.id, ended):
                ended = await self._journal.read(job.id) or ended
        except KelvinError as unavailable:
            # It stays pending in the store, which is the truth: nobody has published an end.
            _log.warning("Job %s failed, but cannot say so: %s", job.id, unavailable)
        return ended

    async def watch_for_cancel(self, job: RunningJob) -> None:
        """Learn of a cancellation that another Pipeline process wrote down."""
        while True:
            await asyncio.sleep(_CANCEL_POLL_S)
            try:
                if await self._journal.is_cancelled(job.id):
                    job.cancel()
                    return
            except StorageUnavailable:
                # Publishing asks again, and decides.
                continue


def last_event(record: JobRecord) -> JobEvent:
    """Return the event that ends a job whose record is final."""
    if record.status == "succeeded":
        return JobEvent(event="stored", id=record.id, result=record.result)
    if record.status == "cancelled":
        return JobEvent(event="cancelled", id=record.id)
    return JobEvent(event="failed", id=record.id, error=record.error)
