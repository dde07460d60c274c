"""How a request becomes a job on record, or turns out to be one already."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from serve.admission import check_schedule, refuse_if_full, refuse_if_late
from serve.attachment import Attachment
from serve.errors import IdempotencyConflict, JobConflict, Overloaded
from serve.forecast import Forecaster
from serve.idempotency import Idempotency, Remembered
from serve.init_image import upright_size, with_own_size
from serve.inputs import Inputs
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.outside_line import line_outside
from serve.requests import GenerateRequest
from serve.room_halves import HALF, RoomHalves
from serve.running import RunningJob
from serve.served_models import ServedModel, ServedModels
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
        forecaster: Says when a request would be done.
        halves: Of the room, while orphans wait.
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
        forecaster: Forecaster,
        halves: RoomHalves,
    ) -> None:
        self._models = models
        self._journal = journal
        self._idempotency = idempotency
        self._uploads = uploads
        self._live = live
        self._owner = owner
        self._book = book
        self._inputs = inputs
        self._guards: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._forecaster = forecaster
        self._halves = halves

    async def admit(
        self, request: GenerateRequest, tenant: str | None = None, *, is_orphan: bool = False
    ) -> GenerateRequest:
        """Return a request resolved, if it can be done and there is room for it.

        Args:
            request: As it was sent.
            tenant: Who leaves room for others; None: nobody asks.
            is_orphan: Whether it was accepted by a Pipeline that is dead.

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
            refuse_if_full(self._models, model, resolved, live, tenant=tenant)
            is_halved = is_orphan or any(
                _share_a_pool(model, self._models.met(name)) for name in self._halves.waited_for
            )
            beside = self._halves.beside(live, is_orphan=is_orphan) if is_halved else None
            if beside is not None:
                refuse_if_full(self._models, model, resolved, beside, HALF)
        except Overloaded as full:
            full.retry_after_s = self._book.until_one_ends(live)
            if is_orphan:
                self._halves.waited_for.add(model.facts.spec.name)
            elif (outside := line_outside()) is not None:
                full.retry_after_s = outside.refuse(
                    full.retry_after_s, self._book.between_ends(live)
                )
            raise
        await self._uploads.refuse_if_full(resolved, [job.request for job in live])
        return resolved

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
        if known.job_id in self._live:
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
            resolved = await self.admit(recorded.request or request, tenant=tenant)
            job, start = self._taken_in(known.job_id, resolved, tenant, request), None
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
        resolved = await self.admit(bare, tenant=tenant)
        job_id = new_job_id()
        if known is not None:
            job_id, resolved = known.job_id, resolved.model_copy(update={"seed": known.seed})
        if start is not None:
            resolved = resolved.model_copy(update={"init_image": self._inputs.uri(job_id, tenant)})
        return self._taken_in(job_id, resolved, tenant, request), start

    def _taken_in(
        self, job_id: str, resolved: GenerateRequest, tenant: str, sent: GenerateRequest
    ) -> RunningJob:
        """Return a job that takes up room; nothing may be awaited since it was admitted.

        It is among the living before it is on record, or it would be taken for an orphan.
        """
        if job_id in self._live:
            raise JobConflict(
                "This Pipeline has just taken the job over.", field="id", value=job_id
            )
        model = self._models.met(resolved.model)
        forecast = None if model is None else self._forecaster.of(model, resolved, tenant)
        if model is not None and forecast is not None:
            # Who was told to come again is known by sending the same.
            places, key = self._forecaster.places, _key(sent, tenant)
            refuse_if_late(model, resolved, forecast, places, key, tenant, line_outside())
        self._book.take(tenant, resolved.num_images, self._live.values())
        job = RunningJob(job_id, resolved, tenant=tenant)
        if model is not None and forecast is not None:
            self._forecaster.take_on(job, model, forecast.estimate)
        self._live[job_id] = job
        return job

    def _drop(self, job: RunningJob) -> None:
        del self._live[job.id]
        job.forget_work()
        self._book.give_back(job.tenant, job.request.num_images)

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
                self._drop(job)

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
                self._drop(job)


def _share_a_pool(model: ServedModel, other: ServedModel | None) -> bool:
    return other is not None and any(
        pools.keys() & other.stages.pools[stage].keys()
        for stage, pools in model.stages.pools.items()
    )


def _key(request: GenerateRequest, tenant: str) -> bytes:
    sent = f"{tenant}\0{request.model_dump_json()}"
    return hashlib.blake2b(sent.encode(), digest_size=16).digest()
