"""What is known of a job that was accepted, from here or from the store; and its end on demand.

A job that lives in this process is asked itself, what has ended here is remembered for a while, and
of everything else the store knows. A job of another tenant is not found.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from serve.ended_jobs import EndedJobs
from serve.endings import last_event
from serve.errors import JobConflict, JobNotFound
from serve.job_ids import checked, not_found
from serve.journal_record import TimedJournal
from serve.removal import Removal
from serve.requests import ImageRef, JobEvent, JobRecord
from serve.running import RunningJob

_FOREIGN_JOB_POLL_S = 1.0


class KnownJobs:
    """Of one Pipeline; on one event loop. What its methods raise is said at the Pipeline's.

    Args:
        live: Jobs that run here, by id.
        ended: Those that did, for a while.
        journal: Of all jobs.
        removal: Deletes them.
        durable: Whether what is accepted outlives this process.

    Attributes:
        before_deletion: Each is awaited with id and tenant of a job that is about to be deleted;
            doors that answer for several jobs at once are told so.
    """

    def __init__(
        self,
        live: Mapping[str, RunningJob],
        ended: EndedJobs,
        journal: TimedJournal,
        removal: Removal,
        *,
        durable: bool,
    ) -> None:
        self._live = live
        self._ended = ended
        self._journal = journal
        self._removal = removal
        self._durable = durable
        self.before_deletion: list[Callable[[str, str], Awaitable[None]]] = []

    async def record(self, job_id: str, tenant: str) -> JobRecord:
        """Return what is known of a job."""
        live = self._live.get(checked(job_id))
        record: JobRecord | None
        if live is not None and not live.is_decided:
            record = live.record("running", durable=self._durable)
        else:
            # Of what ended here, one question to the store does instead of three.
            record = await self._journal.ended(job_id) if job_id in self._ended else None
            record = record or await self._journal.read(job_id)
        if record is None or record.tenant != tenant:
            raise not_found(job_id)
        return record

    async def image(self, job_id: str, index: int, tenant: str) -> ImageRef | None:
        """Return a picture of a job; None: it has none of this index.

        Of a job that has just ended here the store is not asked: who deletes a job deletes its
        pictures, and whoever fetches one finds that out.
        """
        last = self._ended.last(checked(job_id), tenant)
        result = last.result if last is not None else None
        if result is None:
            result = (await self.record(job_id, tenant)).result
        images = () if result is None else result.images
        return next((image for image in images if image.index == index), None)

    async def events(self, job_id: str, tenant: str) -> AsyncIterator[JobEvent]:
        """Yield a job's events; of one that the store alone knows, the first and the last."""
        live = self._live.get(checked(job_id))
        if live is not None and live.tenant == tenant:
            async for event in live.follow():
                yield event
            return
        if ended := self._ended.events(job_id, tenant):
            if await self._journal.was_deleted(job_id):
                raise not_found(job_id)
            for event in ended:
                # Asked of the store, for URLs that have not expired. Other ends stay as they were
                # told: where the store was gone, it does not know of them.
                is_stored = event.event == "stored"
                yield last_event(await self.record(job_id, tenant)) if is_stored else event
            return
        record = await self.record(job_id, tenant)
        yield JobEvent(event="queued", id=job_id)
        while not record.is_over:
            await asyncio.sleep(_FOREIGN_JOB_POLL_S)
            record = await self.record(job_id, tenant)
        yield last_event(record)

    async def cancel(self, job_id: str, tenant: str) -> JobRecord:
        """Cancel a job, wherever it runs; a job cancelled already stays so."""
        await self.record(job_id, tenant)  # not found, where it is somebody else's
        record = await self._journal.request_cancel(job_id)
        if record.status != "cancelled":
            raise JobConflict(
                f"The job has ended: {record.status}.",
                field="id",
                value=job_id,
                allowed="a job that is pending or running",
            )
        self._stop(job_id)
        return record

    async def delete(self, job_id: str, tenant: str) -> JobRecord:
        """Delete a job, its pictures included; one that has not ended is cancelled first."""
        try:
            await self.record(job_id, tenant)  # not found, where it is somebody else's
        except JobNotFound:
            half = await self._journal.half_deleted(job_id)
            if half is None or half.tenant != tenant:
                raise
            await self._removal.delete(job_id, tenant)
            return half.model_copy(update={"status": "cancelled"})
        for told in self.before_deletion:
            await told(job_id, tenant)
        self._ended.forget(job_id)
        record = await self._journal.request_cancel(job_id)
        self._stop(job_id)
        await self._removal.delete(job_id, record.tenant)
        return record

    def _stop(self, job_id: str) -> None:
        live = self._live.get(job_id)
        if live is not None:
            live.cancel()
