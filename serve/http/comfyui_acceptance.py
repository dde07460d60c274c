"""How a ComfyUI workflow is taken: checked, read as requests, written down with the last job."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from serve.attachment import Attachment
from serve.errors import IdempotencyConflict, KelvinError, StorageUnavailable
from serve.http.comfyui_chains import Chain, chains_of
from serve.http.comfyui_errors import PromptError
from serve.http.comfyui_graph import Graph, NodeError, checked_graph, chosen_of, named
from serve.http.comfyui_history import Jobs, are_over
from serve.http.comfyui_inputs import InputPictures
from serve.http.comfyui_nodes import Catalogue
from serve.http.comfyui_prompts import PromptRecords, chain_key, checked_id, now_ms
from serve.http.comfyui_record import ChainRecord, OtherChain, PromptRecord, drawn_id
from serve.http.comfyui_requests import node_error, request_of
from serve.lora_choice import SUFFIX
from serve.requests import GenerateRequest, JobRecord

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

GUIDE_CHECKPOINT = "stable-diffusion-3.5-fp8.safetensors"
"""What a published deployment guide calls its checkpoint: the service's own model."""
_MODELS = ("ckpt_name", "unet_name")
_SECRETS = (
    "auth_token_comfy_org",
    "api_key_comfy_org",
)  # of ComfyUI's paid nodes; it hides them too
_PREVIEWS = ("auto", "latent2rgb", "taesd")
_MOST_TRIES = 16
_MOST_CHAINS = 64  # of a prompt: where not all fit, those taken in before are cancelled again
_MOST_PICTURES = 64  # of a prompt, to start from; each is looked for in the store


class PromptAcceptance:
    """Takes prompts in.

    Args:
        pipeline: That makes their pictures.
        records: Where they are written down.
        inputs: Pictures that they may start from.
        jobs_of: Returns a prompt's jobs as they are.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        records: PromptRecords,
        inputs: InputPictures,
        jobs_of: Callable[[PromptRecord], Awaitable[Jobs]],
    ) -> None:
        self._pipeline = pipeline
        self._records = records
        self._inputs = inputs
        self._jobs_of = jobs_of

    async def accept(self, body: dict[str, Any], tenant: str) -> PromptRecord:
        """Take a prompt, once it is written down and all its jobs are.

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
        prompt_id = checked_id(body["prompt_id"]) if is_named else None
        prompt, extra = body["prompt"], _extra_data(body)
        digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
        known = None if prompt_id is None else await self._records.find(prompt_id, tenant)
        unwanted: dict[str, str] = {}
        if known is not None and await self._records.is_accepted(_same(known, digest)):
            if await self._is_wanted(known):
                await self._records.remember(known)
                return known
            unwanted, known = _unwanted(known), None
        catalogue = await self._catalogue(prompt, tenant)
        graph = checked_graph(prompt, catalogue)
        chains = chains_of(graph, catalogue)
        if len(chains) > _MOST_CHAINS:
            raise PromptError(
                "invalid_prompt",
                f"The prompt has {len(chains)} KSamplers that outputs show",
                f"at most {_MOST_CHAINS}: each is a job of its own",
            )
        requests = await self._requests(graph, chains, extra, bool(body.get("front")))
        if not graph.outputs:
            raise graph.failed()
        created_ms = now_ms()
        record = PromptRecord(
            id=prompt_id or (str(uuid.uuid4()) if len(requests) > 1 else ""),
            tenant=tenant,
            number=_number(body, created_ms),
            created_ms=created_ms,
            digest=digest,
            prompt=prompt,
            extra_data=extra | {"create_time": created_ms},
            chains=tuple(
                ChainRecord(
                    job="",
                    sampler=chain.sampler,
                    encoder=chain.encoder,
                    decoder=chain.decoder,
                    outputs=chain.outputs,
                )
                for chain, _ in requests
            ),
            node_errors=graph.node_errors,
            warnings=tuple(dict.fromkeys(each for chain, _ in requests for each in chain.warnings)),
        )
        try:
            written = await self._submitted(record, requests, unwanted)
        except NodeError as error:
            # Found out only now: a start image, say, that is damaged.
            types = {error.node: graph.nodes[error.node].class_type}
            for output in list(graph.outputs):
                graph.refuse(output, {error.node: [error.error]}, types)
            raise graph.failed() from None
        # Whoever wrote it down first and died may have said more of it.
        return known or written

    async def _is_wanted(self, record: PromptRecord) -> bool:
        """Return whether a prompt is what its prompt_id stands for, or is to be made anew.

        It is made anew where it was given up, or failed, and nobody can see that any more.
        """
        if await self._records.is_listed(record):
            return True
        jobs = await self._jobs_of(record)
        return not are_over(jobs) or all(job is not None and job.result for job in jobs)

    async def catalogue(self, tenant: str) -> Catalogue:
        """Return all files that a tenant's workflows may name; pictures without what they mean."""
        loras = await self._loras()
        images = dict.fromkeys(await self._inputs.names(tenant), "")
        return Catalogue(await self._checkpoints(), loras, images)

    async def _catalogue(self, prompt: Any, tenant: str) -> Catalogue:
        """Return the files that a workflow needs; what it does not name is not asked for."""
        checkpoints = self._own_checkpoints()
        if any(
            chosen_of(name, tuple(checkpoints), is_file=True) is None
            for name in named(prompt, *_MODELS)
        ):
            checkpoints = await self._checkpoints()
        loras = await self._loras() if named(prompt, "lora_name") else ()
        names = named(prompt, "image")
        if len(names) > _MOST_PICTURES:
            raise PromptError(
                "invalid_prompt",
                f"The prompt starts from {len(names)} pictures",
                f"at most {_MOST_PICTURES}",
            )
        found = await asyncio.gather(*(self._inputs.find(name, tenant) for name in names))
        images = {name: uri for name, uri in zip(names, found, strict=True) if uri}
        return Catalogue(checkpoints, loras, images)

    def _own_checkpoints(self) -> dict[str, str]:
        own = self._pipeline.spec.name
        named = {f"{own}{SUFFIX}": own, GUIDE_CHECKPOINT: own}
        return named | self._pipeline.settings.comfyui.checkpoints

    async def _checkpoints(self) -> dict[str, str]:
        # Serve is asked for it, which costs tens of milliseconds.
        models = [each for each in await self._pipeline.models() if each["state"] == "loaded"]
        return {
            f"{each['name']}{SUFFIX}": each["name"] for each in models
        } | self._own_checkpoints()

    async def _loras(self) -> tuple[str, ...]:
        library = await self._pipeline.lora_library(None)
        return tuple(f"{name}{SUFFIX}" for name in await asyncio.to_thread(library.available))

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
        self,
        record: PromptRecord,
        requests: list[tuple[Chain, GenerateRequest]],
        unwanted: Mapping[str, str],
    ) -> PromptRecord:
        """Accept all jobs of a prompt, or none; return what stands of it now.

        The same prompt may be on its way twice, and so may another one that begins as this does.

        Args:
            record: Of the prompt, without its jobs.
            requests: Of all its chains.
            unwanted: KSampler -> job that is not to be taken for the chain's, though it was.
        """
        jobs, new = await self._submit_others(record, requests[1:], unwanted)
        first, request = requests[0]
        draft = record.made_by(["", *jobs])
        try:
            with _as_node_error(first):
                job, is_new = await self._submit(
                    request, record, 0, draft.attachment(), unwanted.get(first.sampler)
                )
        except (NodeError, KelvinError) as error:
            # What the store did not answer may stand there, and be made: then with all its chains.
            if not isinstance(error, StorageUnavailable):
                await self._give_up(new, record.tenant)
            raise
        if is_new:
            return draft.held_by(job.id)
        written = await self._records.of_job(job.id, record.tenant)
        if written is None or written.digest != record.digest:
            # What both have in common stays.
            kept = set() if written is None else {chain.job for chain in written.chains}
            await self._give_up([job for job in new if job not in kept], record.tenant)
            raise _conflict(record.id)
        return written

    async def _submit_others(
        self,
        record: PromptRecord,
        requests: list[tuple[Chain, GenerateRequest]],
        unwanted: Mapping[str, str],
    ) -> tuple[list[str], list[str]]:
        """Accept the jobs of all chains but the first, or none.

        Returns:
            All, and those of them that nobody had sent before.
        """
        attachment = OtherChain(prompt_id=record.id).attachment()
        jobs: list[str] = []
        new: list[str] = []
        try:
            for index, (chain, request) in enumerate(requests, 1):
                instead_of = unwanted.get(chain.sampler)
                for _ in range(_MOST_TRIES):
                    with _as_node_error(chain):
                        job, is_new = await self._submit(
                            request, record, index, attachment, instead_of
                        )
                    # One that is cancelled was given up, as the prompt was refused then.
                    if job.status != "cancelled":
                        break
                    instead_of = job.id
                else:
                    raise _conflict(record.id)
                jobs.append(job.id)
                new += [job.id] if is_new else []
        except BaseException:
            await self._give_up(new, record.tenant)
            raise
        return jobs, new

    async def _give_up(self, jobs: list[str], tenant: str) -> None:
        for job in jobs:
            with contextlib.suppress(KelvinError):
                await self._pipeline.cancel(job, tenant)

    async def _submit(
        self,
        request: GenerateRequest,
        record: PromptRecord,
        index: int,
        attachment: Attachment,
        instead_of: str | None,
    ) -> tuple[JobRecord, bool]:
        if record.id:
            key = chain_key(record.id, index)
            request = request.model_copy(update={"idempotency_key": key})
        try:
            return await self._pipeline.submit_once(request, record.tenant, attachment, instead_of)
        except IdempotencyConflict:
            raise _conflict(record.id) from None


@contextlib.contextmanager
def _as_node_error(chain: Chain) -> Iterator[None]:
    """Let a request that is wrong be its node's error; what may pass stays what it is."""
    try:
        yield
    except KelvinError as error:
        if error.status not in (400, 404):
            raise
        raise node_error(chain, error) from None


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


def _unwanted(record: PromptRecord) -> dict[str, str]:
    """Return KSampler -> job of a prompt that is to be made anew."""
    if record.id == drawn_id(record.job):
        raise IdempotencyConflict(
            "The prompt was given up or failed, and was removed from history.",
            field="prompt_id",
            value=record.id,
            allowed="another prompt_id, or none: this one was drawn from its job's",
        )
    return {chain.sampler: chain.job for chain in record.chains}


def _conflict(prompt_id: str) -> IdempotencyConflict:
    return IdempotencyConflict(
        "Another prompt was sent under this prompt_id, or a job of it has been deleted.",
        field="prompt_id",
        value=prompt_id,
        allowed="the same prompt as the first time, or a new prompt_id",
    )
