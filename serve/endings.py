"""How a job ends: done, failed or cancelled, as the journal decides.

Several may want to end one job: its own work, whoever cancels it here or through another Pipeline
process, and whoever takes it over. The journal's first writer wins, and everybody else reports what
the winner wrote. Nothing is reported that is not on record, so a store that does not answer is
waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from serve.client_errors import error_from_body
from serve.custody import Custody
from serve.departure import Departure
from serve.errors import (
    JobCancelled,
    JobNotFound,
    KelvinError,
    StageUnavailable,
    StorageUnavailable,
)
from serve.jobs import JobJournal
from serve.requests import GenerateResult, JobEvent, JobRecord
from serve.running import RunningJob

_log = logging.getLogger("ray.serve")
_CANCEL_POLL_S = 5.0
_ELSEWHERE_POLL_S = 1.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_UNFORESEEN = "Internal error; the server's log has the details."
_REMOVED = "The job's records have been removed."

_Answer = TypeVar("_Answer")


class Maker(Protocol):
    """Makes pictures; `serve.served_models.ServedModels` is one."""

    async def make(self, job: RunningJob) -> GenerateResult:
        """Make and store every picture of a job."""


class Endings:
    """Brings live jobs to their end.

    Args:
        production: Makes their pictures.
        journal: Decides how they end.
        custody: Of this process's lease, without which nothing is published.
        departure: Of this process: what fails because everything stops has not failed.
    """

    def __init__(
        self, production: Maker, journal: JobJournal, custody: Custody, departure: Departure
    ) -> None:
        self._production = production
        self._journal = journal
        self._custody = custody
        self._departure = departure

    async def reach(self, job: RunningJob) -> JobEvent | None:
        """Do the job and publish how it ended; return the event that says so.

        It does not raise: a failure is an end like any other. None: the service stops, and the job
        stays pending for its next start.
        """
        try:
            ended = await self._end(job)
        except KelvinError as error:
            # Somebody has meddled with its records; there is nothing to wait for.
            _log.warning("Job %s has no end on record: %s", job.id, error)
            ended = _failed(job, error)
        except Exception:
            _log.exception("Job %s failed in a way nobody foresaw.", job.id)
            ended = _failed(job, KelvinError(_UNFORESEEN))
        if ended is None:
            return None
        if ended.status == "succeeded":
            job.error = None
        elif ended.status == "cancelled":
            job.error = JobCancelled("The job was cancelled.", field="id", value=job.id)
        elif job.error is None:
            job.error = error_from_body(ended.error)
        return last_event(ended)

    async def _end(self, job: RunningJob) -> JobRecord | None:
        try:
            result = await job.work(self._production.make(job))
        except asyncio.CancelledError:
            if not job.is_cancelled:
                raise  # this process is ending, which decides nothing: somebody takes the job over
            if job.is_given_up:
                return await self._elsewhere(job)
            return await self._answered(job, self._cancelled)
        except KelvinError as error:
            if isinstance(error, StageUnavailable) and await self._departure.is_near():
                return None
            ended = _failed(job, error)
        except Exception:
            if self._departure.has_begun:
                _log.exception("Job %s was interrupted by the end of this process.", job.id)
                return None
            _log.exception("Job %s failed in a way nobody foresaw.", job.id)
            ended = _failed(job, KelvinError(_UNFORESEEN))
        else:
            ended = _record(job, status="succeeded", result=result)
        return await self._answered(job, lambda job: self._published(job, ended))

    async def _published(self, job: RunningJob, ended: JobRecord) -> JobRecord:
        await self._custody.holding()
        if await self._journal.publish(job.id, ended):
            return ended
        # Somebody else was first: a cancellation, or whoever took the job over.
        return await self._read(job)

    async def _cancelled(self, job: RunningJob) -> JobRecord:
        try:
            return await self._journal.request_cancel(job.id)
        except JobNotFound:
            return await self._removed(job)

    async def _elsewhere(self, job: RunningJob) -> JobRecord:
        while True:
            record = await self._answered(job, self._read)
            if record.is_over:
                return record
            await asyncio.sleep(_ELSEWHERE_POLL_S)

    async def _read(self, job: RunningJob) -> JobRecord:
        return await self._journal.read(job.id) or await self._removed(job)

    async def _removed(self, job: RunningJob) -> JobRecord:
        if await self._journal.was_deleted(job.id):
            return _record(job, status="cancelled")  # who deletes a job cancels it first
        return _failed(job, KelvinError(_REMOVED))

    async def _answered(
        self, job: RunningJob, ask: Callable[[RunningJob], Awaitable[_Answer]]
    ) -> _Answer:
        """Ask the store until it answers: until then the job has not ended."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await ask(job)
            except StorageUnavailable as error:
                if pause_s == _FIRST_PAUSE_S:
                    _log.warning("The end of job %s waits for the store: %s", job.id, error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

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


def _failed(job: RunningJob, error: KelvinError) -> JobRecord:
    job.error = error
    return _record(job, status="failed", error=error.body())


def _record(job: RunningJob, **ended: Any) -> JobRecord:
    return JobRecord(id=job.id, tenant=job.tenant, request=job.request, **ended)


async def outcome(events: AsyncIterator[JobEvent]) -> GenerateResult:
    """Return the result at the end of a job's events.

    Raises:
        KelvinError: As the job failed; JobCancelled if it was cancelled.
    """
    async for event in events:
        if event.result is not None:
            return event.result
        if event.event == "cancelled":
            raise JobCancelled("The job was cancelled.", field="id", value=event.id)
        if event.is_last:
            raise error_from_body(event.error)
    raise StageUnavailable("The service is stopping.", allowed="try again later")


def last_event(record: JobRecord) -> JobEvent:
    """Return the event that ends a job whose record is final."""
    if record.status == "succeeded":
        return JobEvent(event="stored", id=record.id, result=record.result)
    if record.status == "cancelled":
        return JobEvent(event="cancelled", id=record.id)
    return JobEvent(event="failed", id=record.id, error=record.error)
