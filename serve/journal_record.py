"""The journal as a Pipeline uses it: what it writes is timed, for metrics and traces."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from typing import Literal, TypeVar

from serve import telemetry
from serve.attachment import Attachment
from serve.jobs import JobJournal
from serve.metrics import Metrics
from serve.record_store import RecordStore
from serve.requests import GenerateRequest, JobRecord
from serve.storage import ObjectStore
from serve.tenants import DEFAULT_TENANT

_Answer = TypeVar("_Answer")


class TimedJournal(JobJournal):
    """A journal that tells what its two writes of a job took.

    Args:
        store: Of records.
        pictures: Where those are.
        metrics: Told of each write that succeeded.
    """

    def __init__(self, store: RecordStore, pictures: ObjectStore, metrics: Metrics) -> None:
        super().__init__(store, pictures)
        self._metrics = metrics

    async def accept(
        self,
        job_id: str,
        request: GenerateRequest,
        owner: str | None = None,
        tenant: str = DEFAULT_TENANT,
        attachment: Attachment | None = None,
    ) -> bool:
        """Write a job down, as `JobJournal.accept`."""
        writing = super().accept(job_id, request, owner, tenant, attachment)
        return await self._timed("accept", writing)

    async def publish(self, job_id: str, record: JobRecord) -> bool:
        """Publish how a job ended, as `JobJournal.publish`."""
        return await self._timed("publish", super().publish(job_id, record))

    async def _timed(
        self, record: Literal["accept", "publish"], writing: Awaitable[_Answer]
    ) -> _Answer:
        began = time.monotonic()
        with telemetry.span(f"kelvin.journal.{record}"):
            answer = await writing
        self._metrics.journal_written(record, time.monotonic() - began)
        return answer
