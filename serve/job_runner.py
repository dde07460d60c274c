"""Jobs of one Pipeline process: accepted, run to their end, kept, and left to others when it goes.

A job is journalled before it is accepted and belongs to no connection. It runs as a task of the
event loop, whose last event decides it; a job whose custody is lost is let go without one.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

from opentelemetry.trace import SpanKind

from deployments.replica_stop import stop_signal
from serve import telemetry
from serve.acceptance import Acceptance
from serve.admission import Admission
from serve.adoption import Adoption
from serve.attachment import Attachment
from serve.config import Settings
from serve.departure import Departure
from serve.ended_jobs import EndedJobs
from serve.endings import Endings
from serve.errors import KelvinError, StorageUnavailable
from serve.forecast import Forecaster
from serve.graceful_shutdown import pipeline_graceful_shutdown_s
from serve.idempotency import Idempotency
from serve.inputs import Inputs
from serve.job_keeping import JobKeeping, lease_store
from serve.journal_record import TimedJournal
from serve.model_applications import is_deleted
from serve.models import ModelSpec
from serve.outside_line import line_outside
from serve.pipeline_gauges import PipelineGauges
from serve.pipeline_identity import PipelineIdentity
from serve.record_store import RecordStore
from serve.requests import GenerateRequest, JobEvent
from serve.room_halves import RoomHalves
from serve.running import RunningJob
from serve.served_models import ServedModels
from serve.tenant_book import TenantBook
from serve.uploads import Uploads


class JobRunner:
    """Holds all jobs that live in this process; all on one event loop.

    Args:
        settings: Of the service.
        spec: Of its own model.
        models: That make pictures.
        journal: Of jobs.
        records: Where it is.
        uploads: Of finished pictures.
        inputs: Pictures that requests begin from.
        book: Of what tenants use.
        metrics: Of this process.
        identity: Of this process.

    Attributes:
        live: Jobs that run here, by id.
        ended: Those that did, for a while.
        keeping: Custody of jobs, and what others left.
    """

    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        models: ServedModels,
        journal: TimedJournal,
        records: RecordStore,
        uploads: Uploads,
        inputs: Inputs,
        book: TenantBook,
        metrics: telemetry.Metrics,
        identity: PipelineIdentity,
    ) -> None:
        self.live: dict[str, RunningJob] = {}
        self.ended = EndedJobs()
        self._models = models
        self._journal = journal
        self._book = book
        self._metrics = metrics
        self._forecaster = Forecaster(settings.tenants)
        halves = RoomHalves()
        self._admission = Admission(models, uploads, self.live, book, self._forecaster, halves)
        self._acceptance = Acceptance(
            self._admission,
            models,
            journal,
            Idempotency(records),
            inputs,
            lambda: self.keeping.owner(),
        )
        self._departure = Departure(
            stop_signal(),
            lambda: is_deleted(identity.application),
            pipeline_graceful_shutdown_s(settings.denoiser, spec.defaults),
        )
        self.keeping = JobKeeping(
            Adoption(
                self.live,
                partial(self._admission.admit, is_orphan=True),
                halves,
                self._start,
                settings.journal.recovered_at_once,
                self._departure,
            ),
            settings.journal,
            lease_store(settings, records),
            journal,
            uploads,
            identity.as_json(),
        )
        self._endings = Endings(models, journal, self.keeping.custody, self._departure)
        self._gauges = PipelineGauges(metrics, self.live, self.keeping.custody, uploads)

    def begin(self) -> None:
        """Begin to keep jobs, if that is not done."""
        self.keeping.start()
        self._gauges.start()
        self._departure.start(self.live)

    async def depart(self) -> None:
        """Finish what lives here and leave the rest to others."""
        await self._departure.complete(self.live, self.keeping)

    async def check(self, request: GenerateRequest) -> GenerateRequest:
        """Return a request resolved, as `accept` would take it now; raises as that does."""
        return await self._admission.admit(request)

    async def accept(
        self,
        request: GenerateRequest,
        tenant: str,
        attachment: Attachment | None = None,
        instead_of: str | None = None,
    ) -> RunningJob | str:
        """Return a new job, started, or the id of the one that the request's key stands for.

        Raises:
            KelvinError: The request is not accepted.
        """
        if (line := line_outside()) is not None and line.refused:
            self._metrics.refused("overloaded", line.refused, by="proxy")
        with _asked():
            with telemetry.span("kelvin.accept"):
                try:
                    job = await self._acceptance.accept(request, tenant, attachment, instead_of)
                except KelvinError as error:
                    self._metrics.refused(error.code)
                    if isinstance(error, StorageUnavailable):
                        # What the store did not answer may stand in it, and a key lead to it.
                        self.keeping.may_have_lost_one()
                    raise
            if isinstance(job, RunningJob):
                self._start(job)
        return job

    async def give_up(self, job: RunningJob) -> None:
        """Cancel a job that nobody else knows of; one that is over takes no notice."""
        job.cancel()
        if job.is_let_go:
            with suppress(KelvinError):
                await self._journal.request_cancel(job.id)

    def _start(self, job: RunningJob) -> None:
        self.live[job.id] = job
        model = self._models.met(job.request.model)
        if job.work_left is None and model is not None:
            self._forecaster.take_on(job, model)
        job.publish(JobEvent(event="queued", id=job.id))
        job.start(self._run(job))

    async def _run(self, job: RunningJob) -> None:
        watch = asyncio.create_task(self._endings.watch_for_cancel(job))
        try:
            with telemetry.generate_span(job.id, job.request) as span:
                last = await self._endings.reach(job)
                if last is not None and last.event == "failed" and job.error is not None:
                    telemetry.mark_failed(span, job.error)
        finally:
            watch.cancel()
            # One that was given up may have come back meanwhile.
            if self.live.get(job.id) is job:
                del self.live[job.id]
            self.keeping.room_again()
        if last is None:
            job.let_go()
            return
        job.publish(last)
        self._metrics.job_ended(last.event, time.monotonic() - job.accepted_at)
        self._book.ended(job, last.event)
        self._forecaster.ended(job, last.event, is_last=not self.live)
        self.ended.keep(job.id, job.tenant, job.events)


def _asked() -> AbstractContextManager[object]:
    """Return the span of a request that came by a Python handle: no door has begun one."""
    if telemetry.traceparent() is not None:
        return nullcontext()
    return telemetry.span("kelvin.handle", kind=SpanKind.SERVER)
