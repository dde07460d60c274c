"""The three stages as the Pipeline calls them: which pool, retries where a replica died, errors.

What crosses a process boundary comes back wrapped by Ray; here it is unwrapped, so that the rest
of the Pipeline sees the errors of `serve.errors` and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import exceptions as ray_exceptions
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from cluster.pool_state import ReplicaState, Stage
from cluster.work_sizes import Asked, asked_picture, asked_prompts
from deployments.payloads import (
    DenoiseEvent,
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
    Overloaded,
    StageFailed,
    StageUnavailable,
)
from serve.move_errors import ReplicaLeaving
from serve.moves import Journey
from serve.suspicion import Suspicion
from serve.waking import Waking

_log = logging.getLogger("ray.serve")
_PATH = re.compile(r"(?<![\w:/.])(?:~|\.{1,2})?(?:/[\w.@+~-]+){2,}/?")
_Result = TypeVar("_Result")

# Long enough for the router to learn that a replica is gone, short beside starting a new one.
_PAUSE_BEFORE_RETRY_S = 0.2
# Whether a replica may still be hoped for, while a call waits for its first one.
_LOOK_AGAIN_S = 1.0


class WaitedInVain(StageUnavailable):
    """A pool has no replica, and another one of its stage may have."""


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
                encoded: tuple[PromptEmbedding, ...] = await _answer(
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
                encoded: EncodedImage = await _answer(
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
                    async for events in _items(stream, partial(self._choice.is_vain, pool)):
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
                pixels: Pixels = await _answer(
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


def is_crash(error: BaseException) -> bool:
    """Return whether a replica's process died by itself, neither asked to nor with its node."""
    # Ray tells why an actor died in words only. NODE_OUT_OF_MEMORY is a choice of Ray's, which
    # takes the process that it thinks will be missed least.
    return (
        isinstance(error, ray_exceptions.ActorDiedError)
        # Else the replica lives, and tells of another actor's death.
        and not isinstance(error, ray_exceptions.RayTaskError)
        and not error.preempted
        and "SYSTEM_ERROR" in str(error)
    )


def _beside(suspicion: Suspicion) -> dict[str, Any]:
    """Return what a call says beside its payload, where there is anything to be said."""
    said: dict[str, Any] = {"alone": True} if suspicion.is_suspect else {}
    traceparent = telemetry.traceparent()
    return said if traceparent is None else said | {"traceparent": traceparent}


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
    # Whatever it is, callers are to learn what failed and not where the server keeps its files.
    told = _PATH.sub("(a path)", first_line)
    return StageFailed(f"Stage {stage!r} failed: {type(error).__name__}: {told}")


def _asked_to_stop() -> bool:
    """Tell a cancellation of this very task from one that a replica's end looks like."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _answer(response: Any, is_vain: Callable[[float], bool]) -> Any:
    """Wait for a call, and ask about once a second whether that is vain by now.

    Raises:
        WaitedInVain: It is.
    """
    try:
        return await _unless_vain(response, is_vain)
    except (asyncio.CancelledError, StageUnavailable):
        response.cancel()
        raise


async def _items(
    stream: Any, is_vain: Callable[[float], bool]
) -> AsyncIterator[tuple[DenoiseEvent, ...]]:
    """Yield items; while none has come, as `_answer` waits."""
    items = aiter(stream)
    try:
        yield await _unless_vain(anext(items), is_vain)
    except StopAsyncIteration:
        return
    async for item in items:
        yield item


async def _unless_vain(awaited: Awaitable[_Result], is_vain: Callable[[float], bool]) -> _Result:
    began = monotonic()
    task = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_AGAIN_S))[0]:
            if is_vain(monotonic() - began):
                raise WaitedInVain("The pool has no replica, and another one may have.")
        return task.result()
    finally:
        task.cancel()
