"""A Pipeline on a real store whose three stages are one stand-in that a test can hold or break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from deployments.payloads import (
    EncodedImage,
    Latents,
    Pixels,
    PromptEmbedding,
    Stamp,
    StepProgress,
)
from serve import endings as endings_module
from serve import known_jobs as known_jobs_module
from serve.config import PoolSettings, Settings, StorageSettings
from serve.models import ModelSpec
from serve.pipeline import Pipeline
from serve.pipeline_identity import PipelineIdentity
from serve.requests import GenerateRequest, JobEvent

STAMP = Stamp("r", 1, "fp32", 0.0, 0.1)
ARRAY = np.zeros((2, 2), np.float32)
LATENTS = Latents(np.zeros((16, 2, 2), np.float32), STAMP)
REQUEST = GenerateRequest(prompt="a", seed=5)


class Response:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __await__(self) -> Any:
        return self.answer.__await__()

    def __aiter__(self) -> Any:
        return self.answer

    def cancel(self) -> None:
        pass


class StandIn:
    """All three stages; the denoiser waits at its gate after the first step.

    Attributes:
        hung: A stage that never answers: encode, denoise or decode.
        steps: What the denoiser streams, all but the latents.
        latents: What it ends with, picture after picture; the last one again and again.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.at_gate = asyncio.Event()
        self.error: Exception | None = None
        self.encoded: list[Any] = []
        self.denoised: list[Any] = []
        self.started: list[Any] = []
        self.hung = ""
        self.steps = [StepProgress(1, 2, 0.1), StepProgress(2, 2, 0.1)]
        self.latents = [LATENTS]

    def options(self, **_: Any) -> StandIn:
        return self

    def __getattr__(self, stage: str) -> Any:
        class Method:
            def remote(method, payload: Any) -> Response:
                return Response(getattr(self, f"_{stage}")(payload))

        return Method()

    async def _hang_if(self, stage: str) -> None:
        if self.hung == stage:
            await asyncio.Event().wait()

    async def _encode(self, jobs: Any) -> Any:
        await self._hang_if("encode")
        if isinstance(jobs, np.ndarray):  # of the decoders
            self.started.append(jobs)
            height, width = jobs.shape[0] // 8, jobs.shape[1] // 8
            mean = np.zeros((16, height, width), np.float32)
            return EncodedImage(mean, mean, STAMP)
        self.encoded.extend(jobs)
        return tuple(
            PromptEmbedding(ARRAY, ARRAY[0], (job.prompt,), STAMP, tokens=len(job.prompt))
            for job in jobs
        )

    async def _denoise(self, job: Any) -> AsyncIterator[Any]:
        self.denoised.append(job)
        first, *others = self.steps
        yield (first,)
        self.at_gate.set()
        await self._hang_if("denoise")
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        latents = self.latents[0] if len(self.latents) == 1 else self.latents.pop(0)
        yield (*others, latents)

    async def _decode(self, latents: Latents) -> Pixels:
        await self._hang_if("decode")
        return Pixels(np.zeros((16, 16, 3), np.uint8), STAMP)


def new_pipeline(
    stages: Any,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    narrowest: str = "denoiser",
    **sections: Any,
) -> Pipeline:
    monkeypatch.setattr(
        PipelineIdentity, "of_this_process", classmethod(lambda cls: cls("p", 1, "n"))
    )
    monkeypatch.setattr(endings_module, "_CANCEL_POLL_S", 0.05)
    monkeypatch.setattr(known_jobs_module, "_FOREIGN_JOB_POLL_S", 0.05)
    narrow = PoolSettings(name="narrow", max_ongoing_requests=2, max_queued_requests=1)
    spec = ModelSpec(
        name="m",
        licence="",
        defaults={"width": 16, "height": 16},
        latent_channels=16,
        size_multiple=16,
        smallest_side=16,
        largest_width=64,
        largest_height=64,
        largest_area=4096,
    )
    settings = Settings(storage=storage).model_copy(update={narrowest: (narrow,), **sections})
    names = [pool.name for pools in settings.pools.values() for pool in pools]
    return Pipeline(settings, spec, dict.fromkeys(names, stages))


async def follow(pipeline: Pipeline, job_id: str) -> list[JobEvent]:
    return [event async for event in pipeline.events(job_id)]
