"""ComfyUI's prompts on one Pipeline: accepted, followed, listed, cancelled. No HTTP here."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from serve.detached import detached_context
from serve.errors import IdempotencyConflict, JobConflict, JobNotFound, KelvinError
from serve.http.comfyui_chains import Chain, chains_of
from serve.http.comfyui_errors import PromptError
from serve.http.comfyui_files import image_at, picture_of
from serve.http.comfyui_following import Following
from serve.http.comfyui_graph import Graph, NodeError, checked_graph, named_images
from serve.http.comfyui_history import Jobs, are_over, are_waiting, history_entry
from serve.http.comfyui_inputs import InputPictures
from serve.http.comfyui_nodes import Catalogue
from serve.http.comfyui_prompts import (
    ChainRecord,
    PromptRecord,
    PromptRecords,
    checked_id,
    now_ms,
)
from serve.http.comfyui_requests import node_error, request_of
from serve.http.comfyui_sockets import Sockets
from serve.init_image import file_format
from serve.lora_choice import SUFFIX
from serve.pictures import CONTENT_TYPES
from serve.png_text import with_png_text
from serve.requests import GenerateRequest, ImageRef, JobRecord

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

_log = logging.getLogger("ray.serve")

GUIDE_CHECKPOINT = "stable-diffusion-3.5-fp8.safetensors"
"""What a published deployment guide calls its checkpoint: the service's own model."""
_SECRETS = (
    "auth_token_comfy_org",
    "api_key_comfy_org",
)  # of ComfyUI's paid nodes; it hides them too
_PREVIEWS = ("auto", "latent2rgb", "taesd")
_MOST_TRIES = 16


class ComfyuiDoor:
    """What ComfyUI's routes do.

    Args:
        pipeline: Behind the door.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.sockets = Sockets()
        self.inputs = InputPictures(pipeline)
        self._following: dict[tuple[str, str], asyncio.Task[None]] = {}

    @property
    def records(self) -> PromptRecords:
        """The prompts in the journal's store."""
        return PromptRecords(self._pipeline.records)

    async def catalogue(self, tenant: str, prompt: Any = None) -> Catalogue:
        """Return the files that workflows may name.

        Args:
            tenant: Whose pictures.
            prompt: Only the pictures that it loads are looked for; None: all are listed.
        """
        models = [each["name"] for each in await self._pipeline.models() if _takes_requests(each)]
        own = models[0]
        checkpoints = {f"{name}{SUFFIX}": name for name in models}
        checkpoints[GUIDE_CHECKPOINT] = own
        checkpoints |= self._pipeline.settings.comfyui.checkpoints
        loras = await asyncio.to_thread((await self._pipeline.lora_library(own)).available)
        if prompt is None:
            images = dict.fromkeys(await self.inputs.names(tenant), "")
        else:
            names = named_images(prompt)
            found = await asyncio.gather(*(self.inputs.find(name, tenant) for name in names))
            images = {name: uri for name, uri in zip(names, found, strict=True) if uri}
        return Catalogue(checkpoints, tuple(f"{name}{SUFFIX}" for name in loras), images)

    async def accept(self, body: dict[str, Any], tenant: str) -> PromptRecord:
        """Take a prompt, once its jobs are accepted and it is written down.

        Args:
            body: Of `POST /prompt`.
            tenant: Whose.

        Raises:
            PromptError: It is not one that can be made; carries `node_errors`.
            KelvinError: Its jobs are not accepted, or its prompt_id has another prompt.
        """
        if "prompt" not in body:
            raise PromptError("no_prompt", "No prompt provided", "No prompt provided")
        is_named = body.get("prompt_id") is not None
        prompt_id = checked_id(body["prompt_id"]) if is_named else str(uuid.uuid4())
        prompt, extra = body["prompt"], _extra_data(body)
        digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
        if is_named and (known := await self.records.find(prompt_id, tenant)) is not None:
            return _same(known, digest)
        catalogue = await self.catalogue(tenant, prompt)
        graph = checked_graph(prompt, catalogue)
        chains = chains_of(graph, catalogue)
        requests = await self._requests(graph, chains, extra, bool(body.get("front")))
        if not graph.outputs:
            raise graph.failed()
        try:
            jobs = await self._submitted(requests, prompt_id if is_named else None, tenant)
        except NodeError as error:
            # Found out only now: a start image, say, that is damaged.
            types = {error.node: graph.nodes[error.node].class_type}
            for output in list(graph.outputs):
                graph.refuse(output, {error.node: [error.error]}, types)
            raise graph.failed() from None
        created_ms = now_ms()
        record = PromptRecord(
            id=prompt_id,
            tenant=tenant,
            number=_number(body, created_ms),
            created_ms=created_ms,
            digest=digest,
            prompt=prompt,
            extra_data=extra | {"create_time": created_ms},
            chains=tuple(
                ChainRecord(
                    job=job,
                    sampler=chain.sampler,
                    encoder=chain.encoder,
                    decoder=chain.decoder,
                    outputs=chain.outputs,
                )
                for job, (chain, _) in zip(jobs, requests, strict=True)
            ),
            node_errors=graph.node_errors,
            warnings=tuple(dict.fromkeys(each for chain, _ in requests for each in chain.warnings)),
        )
        record = _same(await self.records.write(record), digest)
        self.follow(record)
        await self.tell_status(tenant)
        return record

    def follow(self, record: PromptRecord) -> None:
        """Tell a prompt's client what happens, and close the prompt in the end."""
        key = record.tenant, record.id
        if key in self._following:
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._follow(record), context=detached_context())
        self._following[key] = task
        task.add_done_callback(lambda _: self._following.pop(key, None))

    async def jobs_of(self, record: PromptRecord) -> Jobs:
        """Return a prompt's jobs as they are."""
        return await asyncio.gather(
            *(self._job(chain.job, record.tenant) for chain in record.chains)
        )

    async def open(self, tenant: str) -> list[tuple[PromptRecord, Jobs]]:
        """Return a tenant's prompts that are not over, oldest first, with their jobs."""
        found: list[tuple[PromptRecord, Jobs]] = []
        for record in await self.records.open(tenant):
            jobs = await self.jobs_of(record)
            if not are_over(jobs):
                found.append((record, jobs))
            elif (tenant, record.id) not in self._following:
                # Whoever followed it has died.
                await self.records.close(record)
        return found

    async def queue(self, tenant: str) -> dict[str, list[Any]]:
        """Return what `GET /queue` says."""
        running: list[Any] = []
        waiting: list[Any] = []
        for record, jobs in await self.open(tenant):
            (waiting if are_waiting(jobs) else running).append(record.queue_item())
        return {"queue_running": running, "queue_pending": waiting}

    async def remaining(self, tenant: str) -> dict[str, Any]:
        """Return how many prompts of a tenant are not over, as ComfyUI says it."""
        return {"exec_info": {"queue_remaining": len(await self.open(tenant))}}

    async def history(self, record: PromptRecord) -> dict[str, Any] | None:
        """Return a prompt's entry in `/history`; None: it is not over."""
        jobs = await self.jobs_of(record)
        return history_entry(record, jobs) if are_over(jobs) else None

    async def cancel(self, record: PromptRecord) -> None:
        """Cancel what of a prompt has not ended."""
        for chain in record.chains:
            with contextlib.suppress(JobConflict, JobNotFound):
                await self._pipeline.cancel(chain.job, record.tenant)

    async def cancel_all(self, tenant: str, *, waiting: bool) -> None:
        """Cancel a tenant's prompts of which work has begun, or those that wait."""
        for record, jobs in await self.open(tenant):
            if are_waiting(jobs) == waiting:
                await self.cancel(record)

    async def output_picture(self, filename: str, tenant: str) -> tuple[bytes, str]:
        """Return a picture by the name that history gave it, and its content type.

        Raises:
            JobNotFound: There is none.
        """
        found = picture_of(filename)
        job = None if found is None else await self._job(found[0], tenant)
        image = None if found is None or job is None else image_at(job.result, found[1])
        if job is None or image is None:
            raise _no_picture(filename)
        return await self.picture(image, job.id, tenant), CONTENT_TYPES[image.output_format]

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
        data, record = await asyncio.gather(
            self._pipeline.picture(image), self.records.of_job(job_id, tenant)
        )
        if record is None or image.output_format != "png":
            return data
        return with_png_text(data, record.png_text())

    async def tell_status(self, tenant: str) -> None:
        """Tell every websocket of a tenant how many prompts are not over."""
        if sockets := self.sockets.of_tenant(tenant):
            status = {"status": await self.remaining(tenant)}
            for socket in sockets:
                socket.send("status", status)

    async def _job(self, job_id: str, tenant: str) -> JobRecord | None:
        try:
            return await self._pipeline.job(job_id, tenant)
        except JobNotFound:
            return None

    async def _requests(
        self, graph: Graph, chains: list[Chain], extra: dict[str, Any], front: bool
    ) -> list[tuple[Chain, GenerateRequest]]:
        """Return the requests of all chains that can be made; the others become node errors."""
        priority = 1 if front else 0
        found: list[tuple[Chain, GenerateRequest]] = []
        for chain in chains:
            try:
                with _as_node_error(chain):
                    textual = await self._with_text_part(chain)
                    request = request_of(
                        chain,
                        textual.__contains__,
                        with_previews=self._wants_previews(extra),
                        priority=priority,
                    )
                    await self._pipeline.check(request)
            except NodeError as error:
                types = {error.node: graph.nodes[error.node].class_type}
                for output in chain.outputs:
                    graph.refuse(output, {error.node: [error.error]}, types)
            else:
                found.append((chain, request))
        return found

    async def _with_text_part(self, chain: Chain) -> set[str]:
        """Return those of a chain's LoRAs that adapt text encoders too, where it matters."""
        unequal = {lora.file for lora in chain.loras if lora.clip != lora.model}
        if not unequal:
            return set()
        library = await self._pipeline.lora_library(chain.fields["model"])
        found = await asyncio.gather(
            *(asyncio.to_thread(library.has_text_part, file) for file in unequal)
        )
        return {file for file, has in zip(unequal, found, strict=True) if has}

    def _wants_previews(self, extra: dict[str, Any]) -> bool:
        if not isinstance(extra.get("client_id"), str):
            return False
        asked = extra.get("preview_method", "default")
        if asked in (None, "default"):
            return self._pipeline.settings.comfyui.previews
        return asked in _PREVIEWS

    async def _submitted(
        self, requests: list[tuple[Chain, GenerateRequest]], prompt_id: str | None, tenant: str
    ) -> list[str]:
        """Accept all jobs of a prompt, or none."""
        jobs: list[str] = []
        try:
            for index, (chain, request) in enumerate(requests):
                with _as_node_error(chain):
                    jobs.append(await self._submit(request, prompt_id, index, tenant))
        except BaseException:
            for job in jobs:
                with contextlib.suppress(KelvinError):
                    await self._pipeline.cancel(job, tenant)
            raise
        return jobs

    async def _submit(
        self, request: GenerateRequest, prompt_id: str | None, index: int, tenant: str
    ) -> str:
        if prompt_id is None:
            return (await self._pipeline.submit(request, tenant)).id
        for attempt in range(_MOST_TRIES):
            key = f"comfyui:{prompt_id}:{index}:{attempt}"
            keyed = request.model_copy(update={"idempotency_key": key})
            job = await self._pipeline.submit(keyed, tenant)
            # A prompt without a record whose job is cancelled was given up while it was accepted.
            if job.status != "cancelled":
                return job.id
        raise _conflict(prompt_id)

    async def _follow(self, record: PromptRecord) -> None:
        following = Following(self._pipeline, self.sockets, record, self.jobs_of, self.picture)
        try:
            await following.run()
            await self.records.close(record)
            await self.tell_status(record.tenant)
        except Exception:
            # The store is away. Whoever asks for open prompts next finds that this one is over.
            _log.exception("prompt %s is not followed to its end", record.id)
        following.end()


@contextlib.contextmanager
def _as_node_error(chain: Chain) -> Iterator[None]:
    """Let a request that is wrong be its node's error; what may pass stays what it is."""
    try:
        yield
    except KelvinError as error:
        if error.status not in (400, 404):
            raise
        raise node_error(chain, error) from None


def _no_picture(filename: str) -> JobNotFound:
    return JobNotFound(
        "There is no such picture.",
        field="filename",
        value=filename,
        allowed="a name that /history, the websocket or /upload/image gave",
    )


def _takes_requests(model: dict[str, Any]) -> bool:
    return bool(model["state"] == "loaded")


def _extra_data(body: dict[str, Any]) -> dict[str, Any]:
    extra = body.get("extra_data")
    kept = dict(extra) if isinstance(extra, dict) else {}
    for name in _SECRETS:
        kept.pop(name, None)
    if isinstance(body.get("client_id"), str):
        kept["client_id"] = body["client_id"]
    return kept


def _number(body: dict[str, Any], created_ms: int) -> int | float:
    number = body.get("number")
    if isinstance(number, int | float) and not isinstance(number, bool):
        return number
    return -created_ms if body.get("front") else created_ms


def _same(record: PromptRecord, digest: str) -> PromptRecord:
    if record.digest != digest:
        raise _conflict(record.id)
    return record


def _conflict(prompt_id: str) -> IdempotencyConflict:
    return IdempotencyConflict(
        "Another prompt was sent under this prompt_id.",
        field="prompt_id",
        value=prompt_id,
        allowed="the same prompt as the first time, or a new prompt_id",
    )
