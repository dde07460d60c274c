"""On a card, too, a picture that goes on elsewhere is the picture that it would have been."""

import math
import queue
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import deployments.builtin
from deployments.engine import Engine
from deployments.payloads import (
    Checkpoint,
    DenoiseJob,
    Latents,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.text import TextEncoders
from tests.unit.toy_engine import everyone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

BUILTIN = Path(deployments.builtin.__file__).parent / "weights"
NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
TEXTS = ("a large red circle left of a small blue square", "three green triangles", "")
SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")
STEPS = 10
WAIT_S = 120


@pytest.fixture(scope="module")
def prompts() -> list[PromptEmbedding]:
    encoders = TextEncoders.load(BUILTIN, "cpu", "fp32")
    encoded = encoders.encode([TextJob(text, text, text, 48) for text in TEXTS])
    return [PromptEmbedding(e.prompt_embeds, e.pooled_prompt_embeds, (), NOBODY) for e in encoded]


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[Mmdit]]:
    """Two denoisers' models: the same weights, loaded twice."""
    yield [Mmdit.load(BUILTIN, "cuda", "auto") for _ in range(2)]
    torch.cuda.empty_cache()


def job(prompts: list[PromptEmbedding], sampler: str, seed: int = 5) -> DenoiseJob:
    return DenoiseJob(
        job_id=str(seed),
        image=0,
        width=256,
        height=256,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        sampler=sampler,
        scheduler="normal",
        shift=3.0,
        seed=seed,
        positive=prompts[seed % 2],
        negative=prompts[2],
    )


def run(
    mmdit: Mmdit, jobs: Sequence[DenoiseJob], every: int = 0
) -> tuple[list[Checkpoint], list[NDArray[np.float32]]]:
    """Return the first job's checkpoints, and all latents."""
    engine = Engine(mmdit, max_waiting=len(jobs), policy=everyone, checkpoint_every=every)
    ears: list[queue.Queue[Any]] = [queue.Queue() for _ in jobs]
    taken, latents = [], []
    try:
        for each, ear in zip(jobs, ears, strict=True):
            engine.submit(each, ear.put)
        for ear in ears:
            while isinstance(event := ear.get(timeout=WAIT_S), StepProgress):
                if ear is ears[0] and event.checkpoint is not None:
                    taken.append(event.checkpoint)
            assert isinstance(event, Latents), event
            latents.append(event.latents)
    finally:
        engine.close()
    return taken, latents


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_alone_it_keeps_its_bits(
    replicas: list[Mmdit], prompts: list[PromptEmbedding], sampler: str
):
    whole = job(prompts, sampler)
    taken, (undisturbed,) = run(replicas[0], [whole], every=1)
    assert [each.step for each in taken] == list(range(1, STEPS - 1))
    for checkpoint in taken:
        _, (resumed,) = run(replicas[1], [replace(whole, resume=checkpoint)])
        np.testing.assert_array_equal(resumed, undisturbed)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_beside_others_it_differs_by_no_more_than_two_roundings_to_fp8(
    replicas: list[Mmdit], prompts: list[PromptEmbedding], sampler: str
):
    """Two roundings of the same numbers that err by as much differ by the root of two of it."""
    whole = job(prompts, sampler)
    taken, (undisturbed,) = run(replicas[0], [whole], every=5)
    _, (exact,) = run(Mmdit.load(BUILTIN, "cuda", "fp32"), [whole])
    others = [job(prompts, other, seed) for seed, other in enumerate(SAMPLERS, start=20)]
    _, (resumed, *_) = run(replicas[1], [replace(whole, resume=taken[0]), *others])
    own_error = np.linalg.norm(undisturbed - exact)
    assert own_error > 0
    assert np.linalg.norm(resumed - exact) <= 1.25 * own_error
    assert np.linalg.norm(resumed - undisturbed) <= math.sqrt(2) * own_error
