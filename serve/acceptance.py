"""How a request becomes a job on record, or turns out to be one already."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from serve.admission import check_schedule, refuse_if_full
from serve.errors import IdempotencyConflict, JobConflict, Overloaded
from serve.idempotency import Idempotency
from serve.init_image import upright_size, with_own_size
from serve.inputs import Inputs
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.requests import GenerateRequest
from serve.running import RunningJob
from serve.served_models import ServedModels
from serve.tenant_book import TenantBook
from serve.tenants import checked_tenant
from serve.uploads import Uploads


class Acceptance:
    """Takes requests in.

    Args:
        models: Of the service.
        journal: Where jobs are written down.
        idempotency: The keys beside it.
        uploads: Of finished pictures.
        live: All jobs of this process by id; accepted ones are added.
        owner: Returns the lease under which a job may be accepted.
        book: Of tenants.
        inputs: Start images.
    """

    def __init__(
        self,
        models: ServedModels,
        journal: JobJournal,
        idempotency: Idempotency,
        uploads: Uploads,
        live: dict[str, RunningJob],
        owner: Callable[[], Awaitable[str | None]],
        book: TenantBook,
        inputs: Inputs,
    ) -> None:
        self._models = models
        self._journal = journal
        self._idempotency = idempotency
        self._uploads = uploads
        self._live = live
        self._owner = owner
        self._book = book
        self._inputs = inputs

    async def admit(
        self, request: GenerateRequest, share: float = 1.0, tenant: str | None = None
    ) -> GenerateRequest:
        """Return a request resolved, if it can be done and fits into this share of the room.

        Args:
            request: As it was sent.
            share: Of the room, that may be taken up in all.
            tenant: Who leaves room for others; None: nobody asks.

        Raises:
            KelvinError: Why not.
        """
        model = await self._models.find(request.model)
        resolved = model.facts.spec.resolve(request)
        check_schedule(resolved)
        if resolved.loras:
            await asyncio.to_thread(model.loras.uses, resolved)
        # What was given up is made elsewhere.
        live = [job for job in self._live.values() if not job.is_given_up]
        try:
            refuse_if_full(self._models, model, resolved, live, share, tenant)
        except Overloaded as full:
            full.retry_after_s = self._book.until_one_ends(live)
            raise
        await self._uploads.refuse_if_full(resolved, [job.request for job in live])
        return resolved

    async def accept(self, request: GenerateRequest, tenant: str) -> RunningJob | str:
        """Write a job down, to be started now; or return the id of the one that its key stands for.

        Args:
            request: As it was sent.
            tenant: Who sent it.

        Raises:
            KelvinError: It is not accepted.
        """
        known = await self._idempotency.find(request, checked_tenant(tenant))
        if known is not None and await self._is_on_record(known.job_id):
            return known.job_id
        bare = request.model_copy(update={"idempotency_key": None})
        start = None
        if request.init_image is not None:
            start = await self._inputs.load(request.init_image, tenant)
            size = await asyncio.to_thread(upright_size, start)
            model = await self._models.find(request.model)
            bare = with_own_size(bare, size, model.facts.spec)
        resolved = await self.admit(bare, tenant=tenant)
        job_id = new_job_id()
        if request.idempotency_key is not None:
            seed = resolved.seed or 0
            known = await self._idempotency.remember(request, job_id, seed, tenant)
            if await self._is_on_record(known.job_id):
                return known.job_id
            job_id, resolved = known.job_id, resolved.model_copy(update={"seed": known.seed})
        if job_id in self._live:
            return job_id  # the same key, sent twice at the same time
        if start is not None:
            resolved = resolved.model_copy(update={"init_image": self._inputs.uri(job_id, tenant)})
        self._book.take(tenant, resolved.num_images, self._live.values())
        job = RunningJob(job_id, resolved, tenant=tenant)
        self._live[job_id] = job  # before it is on record, or it would be taken for an orphan
        try:
            if start is not None:
                size = resolved.width or 0, resolved.height or 0
                await self._inputs.keep(job_id, tenant, start, *size)
            is_new = await self._journal.accept(job_id, resolved, await self._owner(), tenant)
        except JobConflict:
            # The same key, resolved by another Pipeline with other defaults, a moment earlier.
            is_new = False
        except BaseException as error:
            del self._live[job_id]
            self._book.give_back(tenant, resolved.num_images)
            job.refuse(error)
            raise
        if not is_new:
            # Another Pipeline was quicker with the same key.
            del self._live[job_id]
            self._book.give_back(tenant, resolved.num_images)
            return job_id
        return job

    async def _is_on_record(self, job_id: str) -> bool:
        if job_id in self._live or await self._journal.read(job_id) is not None:
            return True
        if await self._journal.was_deleted(job_id):
            raise IdempotencyConflict(
                "The job of this idempotency key has been deleted.",
                field="idempotency_key",
                allowed="a new key",
            )
        return False
