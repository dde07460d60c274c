"""ComfyUI's prompts on one Pipeline: accepted, followed, listed, cancelled. No HTTP here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from serve.detached import detached_context
from serve.errors import (
    JobConflict,
    JobNotFound,
    KelvinError,
    RecordUnreadable,
)
from serve.http.comfyui_acceptance import PromptAcceptance
from serve.http.comfyui_files import picture_of
from serve.http.comfyui_following import Following
from serve.http.comfyui_history import Jobs, are_over, are_waiting, history_entry
from serve.http.comfyui_inputs import InputPictures
from serve.http.comfyui_nodes import Catalogue
from serve.http.comfyui_prompts import MOST_BYTES_LISTED, PromptRecords, now_ms
from serve.http.comfyui_recent import RecentTexts
from serve.http.comfyui_record import PromptRecord
from serve.http.comfyui_sockets import Socket, Sockets
from serve.init_image import file_format
from serve.pictures import CONTENT_TYPES
from serve.png_text import with_png_text
from serve.requests import ImageRef, JobRecord

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

_log = logging.getLogger("ray.serve")

_LOOKED_AGAIN_S = 1.0
_CLOCKS_DIFFER_MS = 5_000
_WRITTEN_WITHIN_MS = 60_000  # of a prompt's time, however slow the store is
_TOLD_KEPT = 1000

_Key = tuple[str, str, int]


class ComfyuiDoor:
    """What ComfyUI's routes do.

    Args:
        pipeline: Behind the door.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.sockets = Sockets()
        self.inputs = InputPictures(pipeline)
        self._following: dict[_Key, asyncio.Task[None]] = {}
        self._told: OrderedDict[_Key, None] = OrderedDict()
        self._recent = RecentTexts()
        pipeline.before_deletion.append(self.hand_on)

    @property
    def records(self) -> PromptRecords:
        """The prompts in the journal's store."""
        return PromptRecords(self._pipeline.records)

    async def accept(self, body: dict[str, Any], tenant: str) -> PromptRecord:
        """Take a prompt, as `PromptAcceptance.accept` does, and follow it."""
        record = await self._acceptance.accept(body, tenant)
        self._recent.keep(record)
        self.follow(record)
        return record

    async def catalogue(self, tenant: str) -> Catalogue:
        """Return all files that a tenant's workflows may name."""
        return await self._acceptance.catalogue(tenant)

    @property
    def _acceptance(self) -> PromptAcceptance:
        return PromptAcceptance(self._pipeline, self.records, self.inputs, self.jobs_of)

    def follow(self, record: PromptRecord) -> None:
        """Tell a prompt's client what happens."""
        key = _key(record)
        if key in self._following:
            return
        self._told[key] = None
        while len(self._told) > _TOLD_KEPT:
            self._told.popitem(last=False)
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._follow(record), context=detached_context())
        self._following[key] = task

    async def meet(self, tenant: str, client: str, socket: Socket) -> None:
        """Tell a client how many prompts are left, and follow its own that are not followed yet.

        Such are those of before a restart, and, of several Pipelines, those of the others. A
        Pipeline that is the only one follows all of a tenant's: by that it counts what is left.

        Args:
            tenant: Whose.
            client: Whose prompts.
            socket: That is told.

        Raises:
            StorageUnavailable: The store does not answer.
        """
        left = 0
        followed: list[PromptRecord] = []
        async for record, _, _ in self.open(tenant):
            left += 1
            if record.client == client or self._is_only_one:
                followed.append(record)
        socket.send("status", {"status": _remaining(left), "sid": client})
        for record in followed:
            self.follow(record)

    async def watch(self, tenant: str, client: str, socket: Socket) -> None:
        """Follow a client's prompts that other Pipelines accept, as long as it listens.

        Args:
            tenant: Whose.
            client: Whose prompts.
            socket: That is told how many are left, where others may change that.
        """
        since_ms = now_ms() - _CLOCKS_DIFFER_MS
        known: set[str] = set()
        left: dict[str, Any] | None = None
        while not self._is_only_one:
            await asyncio.sleep(_LOOKED_AGAIN_S)
            looked_ms = now_ms()
            with contextlib.suppress(KelvinError):
                async for record in self.records.since(tenant, since_ms, known):
                    known.add(record.job)
                    if record.client == client and _key(record) not in self._told:
                        self.follow(record)
                since_ms = max(since_ms, looked_ms - _WRITTEN_WITHIN_MS)
                last, left = left, await self.remaining(tenant)
                if left != last:
                    socket.send("status", {"status": left})

    async def jobs_of(self, record: PromptRecord) -> Jobs:
        """Return a prompt's jobs as they are."""
        return await asyncio.gather(
            *(self._job(chain.job, record.tenant) for chain in record.chains)
        )

    async def open(self, tenant: str) -> AsyncIterator[tuple[PromptRecord, Jobs, int]]:
        """Yield a tenant's prompts that are not over, oldest first, with jobs and bytes of each."""
        pending = [job.id for job in await self._pipeline.under_way(tenant)]
        async for record, size in self.records.of_jobs(pending, tenant):
            jobs = await self.jobs_of(record)
            if not are_over(jobs):
                yield record, jobs, size

    async def queue(self, tenant: str) -> dict[str, list[Any]]:
        """Return what `GET /queue` says: every prompt, and the workflows of as many as it may have.

        Who looks for a prompt there and does not find it takes it for lost, so none is left out.
        """
        running: list[Any] = []
        waiting: list[Any] = []
        shown = 0
        async for record, jobs, size in self.open(tenant):
            shown += size
            is_whole = shown <= MOST_BYTES_LISTED
            item = record.queue_item() if is_whole else record.short_queue_item()
            (waiting if are_waiting(jobs) else running).append(item)
        return {"queue_running": running, "queue_pending": waiting}

    async def remaining(self, tenant: str) -> dict[str, Any]:
        """Return how many prompts of a tenant are not over, as ComfyUI says it."""
        return _remaining(sum([1 async for _ in self.open(tenant)]))

    async def history_of(self, prompt_id: str, tenant: str) -> dict[str, Any] | None:
        """Return the entry in `/history` of a prompt; None: there is none, as yet or any more."""
        record = await self.records.find(prompt_id, tenant)
        if record is None or (entry := await self.history(record)) is None:
            return None
        return entry if await self.records.is_listed(record) else None

    async def history(self, record: PromptRecord) -> dict[str, Any] | None:
        """Return the entry of a prompt that is listed; None: it is not over."""
        jobs = await self.jobs_of(record)
        return history_entry(record, jobs) if are_over(jobs) else None

    async def forget(self, record: PromptRecord) -> None:
        """Remove a prompt from history, if it is over and so in it; its pictures stay."""
        if are_over(await self.jobs_of(record)):
            await self.records.forget(record)

    async def clear(self, tenant: str) -> None:
        """Remove all prompts of a tenant that are over from history."""
        # What is older stands among what is not over, or is over: it need not be read.
        since_ms = now_ms() - _WRITTEN_WITHIN_MS
        async for record in self.records.since(tenant, since_ms):
            await self.forget(record)
        going_on = {record.job async for record, _, _ in self.open(tenant)}
        await self.records.forget_older(tenant, since_ms, going_on)

    async def hand_on(self, job_id: str, tenant: str) -> None:
        """Keep a prompt of whose jobs one is about to be deleted, as long as others are left."""
        try:
            record = await self.records.of_job(job_id, tenant)
        except RecordUnreadable:
            return  # which is no reason to keep the job
        if record is not None and len(record.chains) > 1 and record.job == job_id:
            jobs = await self.jobs_of(record)
            left = (job.id for job in jobs if job is not None and job.id != job_id)
            await self.records.hand_on(record, next(left, None))

    async def cancel(self, record: PromptRecord) -> None:
        """Cancel what of a prompt has not ended."""
        for chain in record.chains:
            with contextlib.suppress(JobConflict, JobNotFound):
                await self._pipeline.cancel(chain.job, record.tenant)

    async def cancel_all(self, tenant: str, *, waiting: bool) -> None:
        """Cancel a tenant's prompts of which work has begun, or those that wait."""
        async for record, jobs, _ in self.open(tenant):
            if are_waiting(jobs) == waiting:
                await self.cancel(record)

    async def output_picture(self, filename: str, tenant: str) -> tuple[bytes, str]:
        """Return a picture by the name that history gave it, and its content type.

        Raises:
            JobNotFound: There is none.
        """
        found = picture_of(filename)
        image = None
        if found is not None:
            with contextlib.suppress(JobNotFound):
                image = await self._pipeline.image(*found, tenant)
        if found is None or image is None:
            raise _no_picture(filename)
        return await self.picture(image, found[0], tenant), CONTENT_TYPES[image.output_format]

    async def input_picture(self, path: str, tenant: str) -> tuple[bytes, str]:
        """Return an uploaded picture by its name, and its content type.

        Raises:
            JobNotFound: There is none.
        """
        init_image = await self.inputs.find(path, tenant)
        if init_image is None:
            raise _no_picture(path)
        data = await self._pipeline.start_image(init_image, tenant)
        kind, _ = await asyncio.to_thread(file_format, data)
        return data, CONTENT_TYPES[kind]

    async def picture(self, image: ImageRef, job_id: str, tenant: str) -> bytes:
        """Return the file of a stored picture, with the workflow that made it inside.

        Raises:
            KelvinError: As `Pipeline.picture`.
        """
        if image.output_format != "png":
            return await self._pipeline.picture(image)
        texts = self._recent.find(tenant, job_id)
        if texts is not None:
            return with_png_text(await self._pipeline.picture(image), texts)
        data, record = await asyncio.gather(
            self._pipeline.picture(image), self.records.of_job(job_id, tenant)
        )
        return data if record is None else with_png_text(data, record.png_text())

    async def tell_status(self, tenant: str) -> None:
        """Tell every websocket of a tenant how many prompts are not over."""
        if sockets := self.sockets.of_tenant(tenant):
            # Whoever is the only one need not ask the store, which costs as much as a picture.
            followed = sum(whose == tenant for whose, *_ in self._following)
            left = _remaining(followed) if self._is_only_one else await self.remaining(tenant)
            status = {"status": left}
            for socket in sockets:
                socket.send("status", status)

    @property
    def _is_only_one(self) -> bool:
        return self._pipeline.settings.pipeline.num_replicas == 1

    async def _job(self, job_id: str, tenant: str) -> JobRecord | None:
        try:
            return await self._pipeline.job(job_id, tenant)
        except JobNotFound:
            return None
        except RecordUnreadable as error:
            # It must not hide other prompts, nor keep anybody waiting for what never comes.
            _log.warning("Job %s of a prompt cannot be read: %s", job_id, error)
            return None

    async def _follow(self, record: PromptRecord) -> None:
        following = Following(self._pipeline, self.sockets, record, self.jobs_of, self.picture)
        # Beside the work and not before the answer: to count prompts may take the store some time.
        telling = asyncio.create_task(self._told_status(record.tenant))
        try:
            await following.run()
        except Exception:
            _log.exception("prompt %s is not followed to its end", record.id)
        await telling
        del self._following[_key(record)]
        following.end()
        # Together with the end: what goes to a client at another time goes through the proxy at
        # the cost of a message of its own.
        await self._told_status(record.tenant)

    async def _told_status(self, tenant: str) -> None:
        # One record that cannot be read must not keep anybody from the end of their own prompt.
        with contextlib.suppress(KelvinError):
            await self.tell_status(tenant)


def _key(record: PromptRecord) -> _Key:
    # One that was given up may be made anew under its id; its jobs may be handed on.
    return record.tenant, record.id, record.created_ms


def _remaining(prompts: int) -> dict[str, Any]:
    return {"exec_info": {"queue_remaining": prompts}}


def _no_picture(filename: str) -> JobNotFound:
    return JobNotFound(
        "There is no such picture.",
        field="filename",
        value=filename,
        allowed="a name that /history, the websocket or /upload/image gave",
    )
