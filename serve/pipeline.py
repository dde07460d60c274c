"""The Pipeline deployment: the handle API. What runs a job is in `serve.job_runner`.

It is the ingress as well, so HTTP and `serve.get_app_handle("kelvin")` meet the same replica and a
request saves a hop. A job is journalled before it is accepted and belongs to no connection; only
whoever waits for a result in one call takes the job along when they go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from ray.serve.handle import DeploymentHandle

from serve import telemetry
from serve.attachment import Attachment
from serve.autoscaling_status import shown_autoscaling
from serve.config import Settings
from serve.endings import outcome
from serve.errors import ModelConflict
from serve.further_models import ModelFacts
from serve.inputs import Inputs
from serve.job_ids import not_found
from serve.job_listing import JobListing
from serve.job_runner import JobRunner
from serve.journal_record import TimedJournal
from serve.known_jobs import KnownJobs
from serve.loras import LoraLibrary, shown_loras
from serve.models import ModelSpec
from serve.models_status import shown_further, shown_models
from serve.pipeline_identity import PipelineIdentity
from serve.record_store import record_store
from serve.removal import Removal
from serve.requests import (
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobEvent,
    JobPage,
    JobRecord,
    Upload,
)
from serve.served_models import ServedModels
from serve.spool import spool_of
from serve.storage import ObjectStore
from serve.storage_errors import shown_endpoint
from serve.tenant_book import TenantBook
from serve.tenants import DEFAULT_TENANT, checked_tenant
from serve.uploads import Uploads

if TYPE_CHECKING:
    from fastapi import FastAPI


class Pipeline:
    """Plain class; the builder makes it a deployment. Every method may be called by handle.

    Who calls by handle is trusted to say which tenant they call for, the default one if none; a
    job of another tenant is not found.

    Args:
        settings: All of them.
        spec: Of the model.
        handles: Of every pool, by its name.
    """

    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        handles: Mapping[str, DeploymentHandle],
    ) -> None:
        telemetry.warn_of_what_is_not_set(settings)
        self.settings = settings
        self.spec = spec
        self._store = ObjectStore(settings.storage)
        self.records = records = record_store(settings, self._store)
        self._metrics = telemetry.Metrics()
        self._journal = TimedJournal(records, self._store, self._metrics)
        self._identity = PipelineIdentity.of_this_process()
        own = ModelFacts(spec, settings)
        self._uploads = Uploads(self._store, spool_of(settings))
        self._models = ServedModels(
            own, handles, self._store, self._metrics, self._identity, self._uploads
        )
        self._book = TenantBook(settings.tenants, settings.pipeline.num_replicas, self._metrics)
        self._inputs = Inputs(self._store)
        self._jobs = JobRunner(
            settings,
            spec,
            self._models,
            self._journal,
            records,
            self._uploads,
            self._inputs,
            self._book,
            self._metrics,
            self._identity,
        )
        self._live = self._jobs.live
        durable = settings.journal.enabled
        self._known = KnownJobs(
            self._live,
            self._jobs.ended,
            self._journal,
            Removal(records, self._store),
            durable=durable,
        )
        self.before_deletion = self._known.before_deletion
        self._listing = JobListing(records, self._journal, self._live, durable=durable)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve's hook: the HTTP routes of this very object."""
        from serve.http.native import build_app

        return build_app(self)

    async def generate(
        self, request: GenerateRequest, tenant: str = DEFAULT_TENANT
    ) -> GenerateResult:
        """Make pictures and wait for them; cancelling the call cancels the job.

        Not so with an idempotency key: whoever has it may ask for the job again.

        Raises:
            KelvinError: Every failure, typed.
        """
        request = GenerateRequest.model_validate(request)
        job = await self._jobs.accept(request, tenant)
        if isinstance(job, str):
            return await outcome(self.events(job, tenant))
        try:
            return await job.result()
        finally:
            if request.idempotency_key is None:
                await self._jobs.give_up(job)

    async def stream(
        self, request: GenerateRequest, tenant: str = DEFAULT_TENANT
    ) -> AsyncGenerator[JobEvent, None]:
        """Make pictures and yield the job's events; `.cancel()` on the stream cancels the job.

        Not so with an idempotency key: whoever has it may ask for the job again. Through a handle
        the stream is Ray Serve's response generator: to stop reading it, or to leave a loop over
        it, cancels nothing.

        Raises:
            KelvinError: The request is not accepted. Later failures are the last event.
        """
        request = GenerateRequest.model_validate(request)
        job = await self._jobs.accept(request, tenant)
        if isinstance(job, str):
            async for event in self.events(job, tenant):
                yield event
            return
        try:
            async for event in job.follow():
                yield event
        finally:
            if request.idempotency_key is None:
                await self._jobs.give_up(job)

    async def submit(self, request: GenerateRequest, tenant: str = DEFAULT_TENANT) -> JobRecord:
        """Accept a job and return at once; with an idempotency key that is known, its job.

        Raises:
            KelvinError: The request is not accepted.
        """
        record, _ = await self.submit_once(request, tenant)
        return record

    async def submit_once(
        self,
        request: GenerateRequest,
        tenant: str = DEFAULT_TENANT,
        attachment: Attachment | None = None,
        instead_of: str | None = None,
    ) -> tuple[JobRecord, bool]:
        """Do as `submit`, and return whether the job is new: who made none has none to cancel.

        Args:
            request: As it is sent.
            tenant: Whose.
            attachment: Kept with the job if that is new; `JobJournal.attached` returns it.
            instead_of: A job that is not wanted any more: the request's key may stand for it, and
                stands for a new one then.
        """
        request = GenerateRequest.model_validate(request)
        job = await self._jobs.accept(request, tenant, attachment, instead_of)
        if isinstance(job, str):
            return await self.job(job, tenant), False
        await job.has_begun()
        return job.record("pending", durable=self.settings.journal.enabled), True

    async def check(self, request: GenerateRequest) -> GenerateRequest:
        """Return a request resolved, as `submit` would take it now; raises as that does."""
        return await self._jobs.check(GenerateRequest.model_validate(request))

    async def start_image(self, init_image: str, tenant: str = DEFAULT_TENANT) -> bytes:
        """Return the file that a request's `init_image` means.

        Raises:
            InvalidRequest: It is none, or not one of this tenant's.
        """
        return await self._inputs.load(init_image, tenant)

    async def lora_library(self, model: str | None) -> LoraLibrary:
        """Return the LoRAs of a model; raises where there is none of that name."""
        return (await self._models.find(model)).loras

    async def job(self, job_id: str, tenant: str = DEFAULT_TENANT) -> JobRecord:
        """Return what is known of a job: from here if it lives here, else from the store.

        Raises:
            JobNotFound: No job has this id.
            StorageUnavailable: The store, which alone knows, does not answer.
        """
        return await self._known.record(job_id, tenant)

    async def image(self, job_id: str, index: int, tenant: str = DEFAULT_TENANT) -> ImageRef | None:
        """Return a picture of a job, for `picture`; None: the job has none of this index.

        Raises:
            JobNotFound: No job has this id.
            StorageUnavailable: The store, which alone knows, does not answer.
        """
        return await self._known.image(job_id, index, tenant)

    async def picture(self, image: ImageRef) -> bytes:
        """Return the file of a stored picture; of which job, is for the caller to have asked.

        Raises:
            JobNotFound: It was deleted, or is none of this service's.
            StorageUnavailable: The store does not answer.
        """
        key = self._store.key_of(image.s3_uri)
        data = None if key is None else await self._store.get(key)
        if data is None:
            raise not_found(image.s3_uri)
        return data

    async def jobs(
        self, tenant: str = DEFAULT_TENANT, limit: int = 20, after: str | None = None
    ) -> JobPage:
        """Return some of a tenant's jobs, newest first.

        Args:
            tenant: Whose.
            limit: At most so many, 1 to 100.
            after: `next` of the page before; None: the first page.

        Raises:
            InvalidRequest: One of them is out of range.
            StorageUnavailable: The store does not answer.
        """
        return await self._listing.page(tenant, limit, after)

    async def under_way(self, tenant: str = DEFAULT_TENANT) -> list[JobRecord]:
        """Return all of a tenant's jobs that have not ended, oldest first.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        return await self._listing.under_way(tenant)

    async def cancel(self, job_id: str, tenant: str = DEFAULT_TENANT) -> JobRecord:
        """Cancel a job, wherever it runs; a job cancelled already stays so.

        Raises:
            JobNotFound: No job has this id.
            JobConflict: It has succeeded or failed.
        """
        return await self._known.cancel(job_id, tenant)

    async def delete(self, job_id: str, tenant: str = DEFAULT_TENANT) -> JobRecord:
        """Delete a job, its pictures included; one that has not ended is cancelled first.

        Returns:
            What it was; cancelled, where an earlier try got halfway.

        Raises:
            JobNotFound: No job has this id.
        """
        return await self._known.delete(job_id, tenant)

    async def events(self, job_id: str, tenant: str = DEFAULT_TENANT) -> AsyncIterator[JobEvent]:
        """Yield a job's events from its first, up to its last; leaving early disturbs nothing.

        A job of another process, or of before a restart, is followed through the store: its
        first and last events only.

        Raises:
            JobNotFound: No job has this id.
        """
        async for event in self._known.events(job_id, tenant):
            yield event

    async def status(self) -> dict[str, Any]:
        """Return the model, limits, store and every replica of every stage."""
        return {
            "model": self.spec.model_dump(),
            "stages": await self._models.own.readiness.replicas(),
            "autoscaling": await asyncio.to_thread(
                shown_autoscaling, self._identity.application, self.settings
            ),
            "pipeline": {
                **self._identity.as_json(),
                "running_jobs": len(self._live),
                "joules": self._models.joules,
            },
            "further_models": await shown_further(self._models, self._identity.application),
            "loras": await self.loras(),
            "tenants": self._book.as_json(),
            "limits": {"max_body_bytes": self.settings.pipeline.max_body_bytes},
            "journal": self._jobs.keeping.as_json(),
            "spool": await self._uploads.as_json(),
            "storage": {
                "endpoint_url": shown_endpoint(self.settings.storage.endpoint_url),
                "bucket": self.settings.storage.bucket,
                "prefix": self.settings.storage.prefix,
            },
        }

    async def upload(self, data: bytes, tenant: str = DEFAULT_TENANT) -> Upload:
        """Keep a PNG, JPEG or WebP file, which requests may then name as their `init_image`.

        Raises:
            InvalidRequest: It is no picture, or too large a one.
            LimitReached: The tenant has sent as much as it may for now.
            StorageUnavailable: The store does not answer.
        """
        self._book.take_upload(checked_tenant(tenant), len(data))
        return await self._inputs.upload(data, tenant)

    async def usage(self, tenant: str = DEFAULT_TENANT) -> dict[str, Any]:
        """Return what a tenant has used through this Pipeline since it started.

        Raises:
            InvalidRequest: This is no tenant's name.
        """
        return {**self._book.usage(checked_tenant(tenant)), "pipeline": self._identity.replica}

    async def ready(self) -> dict[str, Any]:
        """Return `{"ready": bool, "checks": [...]}`: every stage answers and the store does."""
        return await self._models.own.readiness.check()

    async def models(self) -> list[dict[str, Any]]:
        """Return every model, whether it takes requests, and what they may ask of it."""
        return await shown_models(self._models)

    async def loras(self) -> dict[str, Any]:
        """Return `{"available": [names]}` of what requests to the own model may name."""
        return await asyncio.to_thread(shown_loras, self._models.own.loras)

    async def shared_settings(self) -> Settings:
        """Return the settings that a further model takes over; they hold no secrets."""
        return self.settings

    async def pool_names(self) -> list[str]:
        """Return the names of all pools of all models, none of which another one may take."""
        further = [model for _, model in (await self._models.further()).values() if model]
        models = (self._models.own, *further)
        return sorted({pool for each in models for pool in each.facts.pool_names})

    async def close_model(self, name: str, for_s: float) -> int:
        """Take no new requests for a further model, and return how many of its jobs run here.

        To be called again before `for_s` is over; whoever unloads it may die.

        Args:
            name: Of the model.
            for_s: Seconds until it takes requests again by itself.

        Raises:
            ModelConflict: It is the service's own.
        """
        if name == self.spec.name:
            raise ModelConflict(
                f"{name!r} is the service's own model, which its Pipeline is bound to.",
                field="model",
                value=name,
                allowed="a further model; the own one changes with the service's settings",
            )
        self._models.close(name, for_s)
        return sum(job.request.model == name for job in self._live.values())

    async def reopen_model(self, name: str) -> None:
        """Undo `close_model`, and learn anew which models there are."""
        self._models.reopen(name)

    async def check_health(self) -> None:
        """Take Serve's first question as the sign to begin keeping jobs; it never fails."""
        self._jobs.begin()

    async def depart(self) -> None:
        """Finish what lives here and leave the rest to others; returns when Serve may stop this."""
        await self._jobs.depart()
