"""How a request becomes a job on record, or turns out to be one already."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from serve.admission import Admission
from serve.attachment import Attachment
from serve.errors import IdempotencyConflict, JobConflict
from serve.idempotency import Idempotency, Remembered
from serve.init_image import upright_size, with_own_size
from serve.inputs import Inputs
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.requests import GenerateRequest
from serve.running import RunningJob
from serve.served_models import ServedModels
from serve.tenants import checked_tenant


class Acceptance:
    """Takes requests in.

    Args:
        admission: Says whether there is room, and gives it.
        models: Of the service.
        journal: Where jobs are written down.
        idempotency: The keys beside it.
        inputs: Start images.
        owner: Returns the lease under which a job may be accepted.
    """

    def __init__(
        self,
        admission: Admission,
        models: ServedModels,
        journal: JobJournal,
        idempotency: Idempotency,
        inputs: Inputs,
        owner: Callable[[], Awaitable[str | None]],
    ) -> None:
        self._admission = admission
        self._models = models
        self._journal = journal
        self._idempotency = idempotency
        self._inputs = inputs
        self._owner = owner
        self._guards: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def accept(
        self,
        request: GenerateRequest,
        tenant: str,
        attachment: Attachment | None = None,
        instead_of: str | None = None,
    ) -> RunningJob | str:
        """Write a job down, to be started now; or return the id of the one that its key stands for.

        Args:
            request: As it was sent.
            tenant: Who sent it.
            attachment: Written down with it.
            instead_of: A job that is not wanted any more: its key may stand for a new one.

        Raises:
            KelvinError: It is not accepted.
        """
        checked_tenant(tenant)
        if request.idempotency_key is None:
            job, start = await self._reserved(request, tenant)
            return job if await self._is_written_down(job, start, attachment) else job.id
        # Whoever sends the same again meanwhile is told of a job once it is on record.
        whose = (tenant, request.idempotency_key)
        guard = self._guards.setdefault(whose, asyncio.Lock())
        async with guard:
            try:
                return await self._accept_once(request, tenant, attachment, instead_of)
            except JobConflict:
                # Another Pipeline has resolved it with other defaults, a moment earlier.
                return await self._accept_once(request, tenant, attachment, instead_of)

    async def _accept_once(
        self,
        request: GenerateRequest,
        tenant: str,
        attachment: Attachment | None,
        instead_of: str | None,
    ) -> RunningJob | str:
        known = await self._idempotency.find(request, tenant, instead_of)
        if known is None:
            job, start = await self._reserved(request, tenant)
            known = await self._remembered(request, job, instead_of)
            if known.job_id == job.id:
                return job if await self._is_written_down(job, start, attachment) else job.id
        if self._admission.lives(known.job_id):
            return known.job_id
        recorded = await self._journal.read(known.job_id)
        if recorded is None:
            if await self._journal.was_deleted(known.job_id):
                raise IdempotencyConflict(
                    "The job of this idempotency key has been deleted.",
                    field="idempotency_key",
                    allowed="a new key",
                )
            job, start = await self._reserved(request, tenant, known)
        elif recorded.is_over or await self._journal.is_pending(known.job_id):
            return known.job_id
        else:
            # Its Pipeline died before it had said that it is pending: nobody would look at it.
            resolved = await self._admission.admit(recorded.request or request, tenant=tenant)
            job, start = self._admission.take_in(known.job_id, resolved, tenant, request), None
        return job if await self._is_written_down(job, start, attachment) else job.id

    async def _reserved(
        self, request: GenerateRequest, tenant: str, known: Remembered | None = None
    ) -> tuple[RunningJob, bytes | None]:
        """Return a job that takes up room, and its start image.

        Args:
            request: As it was sent.
            tenant: Who sent it.
            known: What its key stands for; None: nothing yet.
        """
        bare = request.model_copy(update={"idempotency_key": None})
        start = None
        if request.init_image is not None:
            start = await self._inputs.load(request.init_image, tenant)
            size = await asyncio.to_thread(upright_size, start)
            model = await self._models.find(request.model)
            bare = with_own_size(bare, size, model.facts.spec)
        resolved = await self._admission.admit(bare, tenant=tenant)
        job_id = new_job_id()
        if known is not None:
            job_id, resolved = known.job_id, resolved.model_copy(update={"seed": known.seed})
        if start is not None:
            resolved = resolved.model_copy(update={"init_image": self._inputs.uri(job_id, tenant)})
        return self._admission.take_in(job_id, resolved, tenant, request), start

    async def _remembered(
        self, request: GenerateRequest, job: RunningJob, instead_of: str | None
    ) -> Remembered:
        """Let a request's key stand for a job; drop that where the key stands for another one."""
        known = None
        try:
            seed = job.request.seed or 0
            known = await self._idempotency.remember(request, job.id, seed, job.tenant, instead_of)
            return known
        finally:
            if known is None or known.job_id != job.id:
                self._admission.drop(job)

    async def _is_written_down(
        self, job: RunningJob, start: bytes | None, attachment: Attachment | None
    ) -> bool:
        """Write a job down; drop it where another Pipeline was quicker with the same key."""
        is_new = False
        try:
            if start is not None:
                size = job.request.width or 0, job.request.height or 0
                await self._inputs.keep(job.id, job.tenant, start, *size)
            is_new = await self._journal.accept(
                job.id, job.request, await self._owner(), job.tenant, attachment
            )
            return is_new
        finally:
            if not is_new:
                self._admission.drop(job)
