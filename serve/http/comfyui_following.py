"""A prompt's jobs as the messages that ComfyUI sends while it works."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from serve.errors import KelvinError, StorageUnavailable
from serve.http.comfyui_history import Jobs, are_over, last_message, outputs_of
from serve.http.comfyui_prompts import now_ms
from serve.http.comfyui_record import ChainRecord, PromptRecord
from serve.http.comfyui_sockets import Socket, Sockets
from serve.requests import GenerateResult, ImageRef, JobEvent

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

_ASKED_AGAIN_S = 1.0


class Following:
    """Follows one prompt from its jobs' first events to their last.

    Args:
        pipeline: That has the jobs, or asks the store for them.
        sockets: Of this process; those of the prompt's client are told.
        record: The prompt.
        jobs_of: Returns a prompt's jobs as they are.
        picture_of: Returns the file of a picture of a tenant's job.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sockets: Sockets,
        record: PromptRecord,
        jobs_of: Callable[[PromptRecord], Awaitable[Jobs]],
        picture_of: Callable[[ImageRef, str, str], Awaitable[bytes]],
    ) -> None:
        self._pipeline = pipeline
        self._sockets = sockets
        self._record = record
        self._jobs_of = jobs_of
        self._picture_of = picture_of
        self._executing: str | None = None
        self._stored: set[str] = set()  # jobs

    async def run(self) -> None:
        """Tell all but the very end, which `end` tells; returns when the prompt is over.

        A job that goes on in another process, and a store that is away, are waited for.
        """
        stamps = {"prompt_id": self._record.id, "timestamp": now_ms()}
        self._tell("execution_start", stamps)
        self._tell("execution_cached", {"nodes": [], **stamps})
        await asyncio.gather(*(self._chain(chain) for chain in self._record.chains))
        if all(chain.job in self._stored for chain in self._record.chains):
            self._tell("execution_success", stamps | {"timestamp": now_ms()})
            return
        jobs = await self._ended()
        for chain, job in zip(self._record.chains, jobs, strict=True):
            if job is not None and job.result is not None and job.id not in self._stored:
                await self._show(chain, job.result)
        event, data = last_message(self._record, jobs)
        self._tell(event, data | {"timestamp": now_ms()})

    def end(self) -> None:
        """Tell that the prompt is over, which older clients wait for."""
        self._tell("executing", {"node": None, "prompt_id": self._record.id})

    async def _ended(self) -> Jobs:
        while True:
            with contextlib.suppress(StorageUnavailable):
                jobs = await self._jobs_of(self._record)
                if are_over(jobs):
                    return jobs
            await asyncio.sleep(_ASKED_AGAIN_S)

    async def _chain(self, chain: ChainRecord) -> None:
        steps: dict[int, int] = {}
        try:
            async for event in self._pipeline.events(chain.job, self._record.tenant):
                await self._event(chain, event, steps)
        except KelvinError:
            # Deleted meanwhile, or the store is away: what became of it is asked in the end.
            return

    async def _event(self, chain: ChainRecord, event: JobEvent, steps: dict[int, int]) -> None:
        if event.event == "queued":
            self._execute(chain.encoder)
        elif event.event == "text":
            self._execute(chain.sampler)
        elif event.event == "step":
            self._step(chain, event, steps)
        elif event.event == "decode":
            self._execute(chain.decoder)
        elif event.result is not None:
            await self._show(chain, event.result)

    def _step(self, chain: ChainRecord, event: JobEvent, steps: dict[int, int]) -> None:
        self._execute(chain.sampler)
        # Pictures of a batch go on side by side; ComfyUI shows the first one.
        steps[event.image or 0] = event.step or 0
        if event.image in (None, 0):
            told = {"value": event.step, "max": event.steps, "node": chain.sampler}
            self._tell("progress", told | {"prompt_id": self._record.id})
            if event.preview is not None:
                for socket in self._own():
                    socket.send_preview(base64.b64decode(event.preview))

    async def _show(self, chain: ChainRecord, result: GenerateResult) -> None:
        self._stored.add(chain.job)
        shown = outputs_of(self._record, chain, result)
        for node in chain.outputs:
            self._execute(node)
            if node in shown:
                told = {"node": node, "display_node": node, "output": shown[node]}
                self._tell("executed", told | {"prompt_id": self._record.id})
            elif self._own():
                await self._send_pictures(result)

    async def _send_pictures(self, result: GenerateResult) -> None:
        """Do what SaveImageWebsocket is for."""
        for image in result.images:
            picture = await self._picture_of(image, result.id, self._record.tenant)
            await asyncio.gather(*(socket.send_picture(picture) for socket in self._own()))

    def _execute(self, node: str) -> None:
        if node != self._executing:
            self._executing = node
            told = {"node": node, "display_node": node, "prompt_id": self._record.id}
            self._tell("executing", told)

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        for socket in self._own():
            socket.send(event, data)

    def _own(self) -> tuple[Socket, ...]:
        return self._sockets.of_client(self._record.tenant, self._record.client)
