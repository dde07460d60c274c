"""The three stages as the Pipeline calls them: retries where a replica died, typed errors.

What crosses a process boundary comes back wrapped by Ray; here it is unwrapped, so that the rest
of the Pipeline sees the errors of `serve.errors` and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from time import monotonic
from typing import Any, TypeVar

from ray import exceptions as ray_exceptions
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from deployments.payloads import (
    DenoiseJob,
    Latents,
    Pixels,
    PromptEmbedding,
    StepProgress,
    TextJob,
)
from serve.errors import KelvinError, Overloaded, StageFailed, StageUnavailable

_log = logging.getLogger("ray.serve")
_Result = TypeVar("_Result")

# Long enough for the router to learn that a replica is gone, short beside starting a new one.
_PAUSE_BEFORE_RETRY_S = 0.2


class Stages:
    """Handles to the text, denoise and decode pools."""

    def __init__(
        self,
        text_encoder: DeploymentHandle,
        denoiser: DeploymentHandle,
        vae_decoder: DeploymentHandle,
        *,
        retries: int,
    ) -> None:
        self.handles = {"text": text_encoder, "denoise": denoiser, "decode": vae_decoder}
        self._denoise = denoiser.options(stream=True).denoise
        self._retries = retries

    async def encode(self, jobs: tuple[TextJob, ...]) -> tuple[PromptEmbedding, ...]:
        """Encode prompts, all by one replica."""

        async def attempt() -> tuple[PromptEmbedding, ...]:
            encoded: tuple[PromptEmbedding, ...] = await _answer(
                self.handles["text"].encode.remote(jobs)
            )
            return encoded

        return await self._retried("text", attempt)

    async def denoise(
        self, job: DenoiseJob, on_progress: Callable[[StepProgress], None]
    ) -> Latents:
        """Denoise one picture; after the death of a replica it starts again from step 1.

        Args:
            job: Its deadline_s counts from this call.
            on_progress: Called with each step's progress, from step 1 again after a death.
        """
        began = monotonic()

        async def attempt() -> Latents:
            stream = self._denoise.remote(_with_time_left(job, monotonic() - began))
            try:
                async for events in _items(stream):
                    for event in events:
                        if isinstance(event, Latents):
                            return event
                        on_progress(event)
            except BaseException:
                # The replica stops at its next step; without this it would finish for nobody.
                stream.cancel()
                raise
            raise StageUnavailable("The denoiser's stream ended without latents.")

        return await self._retried("denoise", attempt)

    async def decode(self, latents: Latents) -> Pixels:
        """Decode one picture."""

        async def attempt() -> Pixels:
            pixels: Pixels = await _answer(self.handles["decode"].decode.remote(latents))
            return pixels

        return await self._retried("decode", attempt)

    async def _retried(self, stage: str, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        tries_left = self._retries
        while True:
            try:
                return await attempt()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _asked_to_stop():
                    raise
                typed = typed_error(error, stage)
                if not isinstance(typed, StageUnavailable) or not tries_left:
                    raise typed from None
                _log.warning("Stage %s: %s Trying again.", stage, typed.message)
            tries_left -= 1
            await asyncio.sleep(_PAUSE_BEFORE_RETRY_S)


def _with_time_left(job: DenoiseJob, gone_s: float) -> DenoiseJob:
    if job.deadline_s is None:
        return job
    return replace(job, deadline_s=max(0.0, job.deadline_s - gone_s))


def typed_error(error: BaseException, stage: str) -> KelvinError:
    """Return what a failure of a stage means to the caller.

    Args:
        error: What awaiting a handle raised.
        stage: Named in the message.
    """
    while isinstance(error, ray_exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, KelvinError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded(
            f"Too much work is waiting for stage {stage!r}: {error.message}",
            allowed="try again later; Retry-After says when",
        )
    if isinstance(
        error,
        ray_exceptions.RayActorError
        | ray_exceptions.RaySystemError
        | ray_exceptions.ObjectLostError
        | ray_exceptions.TaskCancelledError
        | ray_exceptions.WorkerCrashedError
        # Ray's handles turn TaskCancelledError into this; who cancels a job here never gets here.
        | asyncio.CancelledError
        | DeploymentUnavailableError
        | ReplicaUnavailableError,
    ):
        return StageUnavailable(
            f"Stage {stage!r} lost the replica that worked on this: {type(error).__name__}."
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return StageFailed(f"Stage {stage!r} failed: {type(error).__name__}: {first_line}")


def _asked_to_stop() -> bool:
    """Tell a cancellation of this very task from one that a replica's end looks like."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _answer(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _items(stream: Any) -> AsyncIterator[tuple[StepProgress | Latents, ...]]:
    async for item in stream:
        yield item
