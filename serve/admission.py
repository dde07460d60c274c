"""Whether a request is let in, and the room that its job takes up from then on.

Nothing is written down here: that is `serve.acceptance`.
"""

from __future__ import annotations

import asyncio
import hashlib

from serve.errors import JobConflict, Overloaded
from serve.forecast import Forecaster
from serve.outside_line import line_outside
from serve.refusals import check_schedule, refuse_if_full, refuse_if_late
from serve.requests import GenerateRequest
from serve.room_halves import HALF, RoomHalves
from serve.running import RunningJob
from serve.served_models import ServedModel, ServedModels
from serve.tenant_book import TenantBook
from serve.uploads import Uploads


class Admission:
    """Lets requests in, and takes their jobs among the living.

    Args:
        models: Of the service.
        uploads: Of finished pictures.
        live: All jobs of this process by id; those taken in are added.
        book: Of tenants.
        forecaster: Says when a request would be done.
        halves: Of the room, while orphans wait.
    """

    def __init__(
        self,
        models: ServedModels,
        uploads: Uploads,
        live: dict[str, RunningJob],
        book: TenantBook,
        forecaster: Forecaster,
        halves: RoomHalves,
    ) -> None:
        self._models = models
        self._uploads = uploads
        self._live = live
        self._book = book
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
            if not is_orphan and (outside := line_outside()) is not None:
                full.retry_after_s = outside.refuse(
                    full.retry_after_s, self._book.between_ends(live)
                )
            raise
        await self._uploads.refuse_if_full(resolved, [job.request for job in live])
        return resolved

    def lives(self, job_id: str) -> bool:
        """Return whether a job is among the living."""
        return job_id in self._live

    def take_in(
        self, job_id: str, resolved: GenerateRequest, tenant: str, sent: GenerateRequest
    ) -> RunningJob:
        """Return a job that takes up room; nothing may be awaited since it was admitted.

        It is among the living before it is on record, or it would be taken for an orphan.

        Args:
            job_id: Of it.
            resolved: What `admit` returned.
            tenant: Whose it is.
            sent: The request as it was sent.

        Raises:
            KelvinError: It would be late, or is more than the tenant may have.
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

    def drop(self, job: RunningJob) -> None:
        """Give back what a job took up that is not to be after all."""
        del self._live[job.id]
        job.forget_work()
        self._book.give_back(job.tenant, job.request.num_images)


def _share_a_pool(model: ServedModel, other: ServedModel | None) -> bool:
    return other is not None and any(
        pools.keys() & other.stages.pools[stage].keys()
        for stage, pools in model.stages.pools.items()
    )


def _key(request: GenerateRequest, tenant: str) -> bytes:
    sent = f"{tenant}\0{request.model_dump_json()}"
    return hashlib.blake2b(sent.encode(), digest_size=16).digest()
