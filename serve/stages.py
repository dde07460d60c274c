"""The three stages as the Pipeline calls them: which pool, and retries where a replica died.

The rest of the Pipeline sees the errors of `serve.errors` and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from cluster.pool_state import ReplicaState, Stage
from cluster.work_sizes import Asked, asked_picture, asked_prompts
from deployments.payloads import (
    DenoiseJob,
    EncodedImage,
    Handover,
    Latents,
    Pixels,
    PromptEmbedding,
    StepProgress,
    TextJob,
)
from serve import telemetry
from serve.errors import (
    KelvinError,
    StageUnavailable,
)
from serve.first_answer import WaitedInVain, answer_of, items_of
from serve.move_errors import ReplicaLeaving
from serve.moves import Journey
from serve.stage_errors import is_crash, typed_error
from serve.suspicion import Suspicion
from serve.waking import Waking

_log = logging.getLogger("ray.serve")
_Result = TypeVar("_Result")

# Long enough for the router to learn that a replica is gone, short beside starting a new one.
_PAUSE_BEFORE_RETRY_S = 0.2


class Choice(Protocol):
    """Which pool takes a piece of work; `serve.pool_choice.PoolChoice` is one."""

    def pool(self, stage: Stage, job: DenoiseJob | None = None) -> str:
        """Return the name of one of the stage's pools."""

    def sending(
        self, stage: Stage, payload: Any, job: DenoiseJob | None = None
    ) -> AbstractContextManager[str]:
        """Yield the name of one of the stage's pools, for a call with that first argument."""

    def is_vain(self, pool: str, waited_s: float) -> bool:
        """Whether what has waited so long at a pool without replicas is better sent anew."""

    def is_asleep(self, stage: Stage) -> bool:
        """Whether a stage has no replica, as far as is known here, and starts on demand."""

    def estimated_s(self, job: DenoiseJob) -> float:
        """Return about how many cool seconds of an H100 denoising takes."""

    def heard(self, pool: str, load: ReplicaState | None) -> None:
        """Take what one of a pool's replicas told of itself."""

    def learnt(self, pool: str, job: DenoiseJob, latents: Latents) -> None:
        """Take what a picture cost there."""

    def took(self, pool: str, kind: Asked, seconds: float) -> None:
        """Take what a call cost there."""


class Stages:
    """Handles to the text, denoise and decode pools.

    Args:
        pools: Stage -> pool -> its handle.
        choice: Among the pools of a stage.
        retries: After the death of a replica.
    """

    def __init__(
        self,
        pools: Mapping[Stage, Mapping[str, DeploymentHandle]],
        choice: Choice,
        *,
        retries: int,
    ) -> None:
        self.pools = pools
        self._choice = choice
        self._denoisers = {
            name: handle.options(stream=True).denoise for name, handle in pools["denoise"].items()
        }
        self._retries = retries
        self._waking = Waking(pools, choice)

    async def encode(self, jobs: tuple[TextJob, ...]) -> tuple[PromptEmbedding, ...]:
        """Encode prompts, all by one replica."""

        async def attempt() -> tuple[PromptEmbedding, ...]:
            with self._choice.sending("text", jobs) as pool:
                suspicion.began()
                encoded: tuple[PromptEmbedding, ...] = await answer_of(
                    self.pools["text"][pool].encode.remote(jobs, **_beside(suspicion)),
                    partial(self._choice.is_vain, pool),
                )
            if encoded:
                self._choice.heard(pool, encoded[0].load)
                seconds = sum(each.stamp.seconds for each in encoded)
                self._choice.took(pool, asked_prompts(len(encoded)), seconds)
            return encoded

        suspicion = Suspicion("text")
        self._waking.wake(("denoise", "decode"))
        return await self._retried("text", attempt, suspicion)

    async def encode_image(self, pixels: NDArray[np.uint8]) -> EncodedImage:
        """Encode a start image, [height, width, 3] RGB; the decoders do it."""
        suspicion = Suspicion("decode")

        async def attempt() -> EncodedImage:
            with self._choice.sending("decode", pixels) as pool:
                suspicion.began()
                encoded: EncodedImage = await answer_of(
                    self.pools["decode"][pool].encode.remote(pixels, **_beside(suspicion)),
                    partial(self._choice.is_vain, pool),
                )
            self._choice.heard(pool, encoded.load)
            return encoded

        return await self._retried("decode", attempt, suspicion)

    async def denoise(
        self, job: DenoiseJob, on_progress: Callable[[StepProgress], None]
    ) -> Latents:
        """Denoise one picture; where a replica dies or goes it goes on from the last checkpoint.

        Args:
            job: Its deadline_s counts from this call.
            on_progress: Called with each step's progress; steps come again that were done after the
                checkpoint which the picture goes on from.
        """
        began = monotonic()
        journey = Journey(job)
        suspicion = Suspicion("denoise")

        async def attempt() -> Latents:
            sent = _with_time_left(journey.next_job(), monotonic() - began)
            sent = replace(sent, alone=suspicion.is_suspect, traceparent=telemetry.traceparent())
            with self._choice.sending("denoise", sent, sent) as pool:
                stream = self._denoisers[pool].remote(sent)
                try:
                    async for events in items_of(stream, partial(self._choice.is_vain, pool)):
                        suspicion.began()
                        for event in events:
                            if isinstance(event, Handover):
                                raise journey.handed_over(event)
                            self._choice.heard(pool, event.load)
                            if isinstance(event, Latents):
                                self._choice.learnt(pool, sent, event)
                                return journey.arrived(event)
                            on_progress(journey.stepped(event))
                except BaseException:
                    # The replica stops at its next step; else it would finish for nobody.
                    stream.cancel()
                    raise
            raise StageUnavailable("The denoiser's stream ended without latents.")

        return await self._retried("denoise", attempt, suspicion, journey.failed)

    def estimated_s(self, job: DenoiseJob) -> float:
        """Return about how many cool seconds of an H100 denoising takes."""
        return self._choice.estimated_s(job)

    def wake(self) -> None:
        """Have stages start that have no replica and start on demand; returns at once."""
        self._waking.wake(("text", "denoise", "decode"))

    async def decode(self, latents: Latents) -> Pixels:
        """Decode one picture."""
        suspicion = Suspicion("decode")

        async def attempt() -> Pixels:
            with self._choice.sending("decode", latents) as pool:
                suspicion.began()
                pixels: Pixels = await answer_of(
                    self.pools["decode"][pool].decode.remote(latents, **_beside(suspicion)),
                    partial(self._choice.is_vain, pool),
                )
            self._choice.heard(pool, pixels.load)
            height, width, _ = pixels.pixels.shape
            self._choice.took(pool, asked_picture(width, height), pixels.stamp.seconds)
            return pixels

        return await self._retried("decode", attempt, suspicion)

    async def _retried(
        self,
        stage: str,
        attempt: Callable[[], Awaitable[_Result]],
        suspicion: Suspicion,
        failed: Callable[[KelvinError], KelvinError] = lambda error: error,
    ) -> _Result:
        tries_left = self._retries
        while True:
            try:
                return await attempt()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _asked_to_stop():
                    raise
                typed = failed(typed_error(error, stage))
                has_crashed = is_crash(error)
                if has_crashed and (proven := suspicion.replica_crashed()) is not None:
                    raise proven from None
                suspicion.left()
                # Whoever is asked to go has done nothing wrong, and neither has its work; nor has
                # who was there when a replica died, or who waited for one that did not come.
                costs_a_try = not (isinstance(typed, ReplicaLeaving | WaitedInVain) or has_crashed)
                if not isinstance(typed, StageUnavailable) or (costs_a_try and not tries_left):
                    raise typed from None
                _log.warning("Stage %s: %s Trying again.", stage, typed.message)
            tries_left -= costs_a_try
            await asyncio.sleep(_PAUSE_BEFORE_RETRY_S)


def _beside(suspicion: Suspicion) -> dict[str, Any]:
    """Return what a call says beside its payload, where there is anything to be said."""
    said: dict[str, Any] = {"alone": True} if suspicion.is_suspect else {}
    traceparent = telemetry.traceparent()
    return said if traceparent is None else said | {"traceparent": traceparent}


def _with_time_left(job: DenoiseJob, gone_s: float) -> DenoiseJob:
    if job.deadline_s is None:
        return job
    return replace(job, deadline_s=max(0.0, job.deadline_s - gone_s))


def _asked_to_stop() -> bool:
    """Tell a cancellation of this very task from one that a replica's end looks like."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
