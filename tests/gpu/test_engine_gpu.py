"""The engine's promises on a card: rows keep to themselves, in FP8, in graphs and out of memory."""

import math
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import deployments.builtin
from deployments.energy import EnergyMeter
from deployments.engine import Engine
from deployments.memory_budget import MemoryBudget
from deployments.payloads import (
    DenoiseEvent,
    DenoiseJob,
    Latents,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.text import TextEncoders
from deployments.sd3.wire import from_wire
from deployments.step_costs import TokenShape
from deployments.warm_up import warm_up
from serve.errors import StageFailed
from tests.unit.toy_engine import everyone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

BUILTIN = Path(deployments.builtin.__file__).parent / "weights"
NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
TEXTS = (
    "a large red circle left of a small blue square",
    "three green triangles",
    "a yellow star on a black background",
    "",
    "a small white ring above a large orange cross",
    "two purple hexagons",
)
SIDE = 32  # latents of 256 x 256 pixels
WAIT_S = 120
Event = DenoiseEvent | BaseException
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def prompts() -> list[PromptEmbedding]:
    encoders = TextEncoders.load(BUILTIN, "cpu", "fp32")
    encoded = encoders.encode([TextJob(text, text, text, 48) for text in TEXTS])
    return [PromptEmbedding(e.prompt_embeds, e.pooled_prompt_embeds, (), NOBODY) for e in encoded]


@pytest.fixture
def fp8() -> Iterator[Mmdit]:
    yield Mmdit.load(BUILTIN, "cuda", "auto")
    torch.cuda.empty_cache()


@pytest.fixture
def inputs(prompts: list[PromptEmbedding]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    embeds = [from_wire(p.prompt_embeds, "cuda", torch.float32) for p in prompts]
    pooled = [from_wire(p.pooled_prompt_embeds, "cuda", torch.float32) for p in prompts]
    latents = torch.randn(len(prompts), 16, SIDE, SIDE, generator=generator)
    sigmas = torch.linspace(1.0, 0.1, len(prompts))
    return latents.cuda(), sigmas.cuda(), torch.stack(embeds), torch.stack(pooled)


def row(inputs: Inputs, at: int) -> Inputs:
    latents, sigmas, embeds, pooled = (each[at : at + 1] for each in inputs)
    return latents, sigmas, embeds, pooled


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def test_a_row_in_a_batch_is_as_near_the_truth_as_it_is_alone(fp8: Mmdit, inputs: Inputs):
    """And from it alone no further than two roundings of the same numbers: the root of two."""
    exact = Mmdit.load(BUILTIN, "cuda", "fp32").velocity(*inputs)
    batched = fp8.velocity(*inputs)
    for at in range(len(batched)):
        alone = fp8.velocity(*row(inputs, at))[0]
        own_error = relative(alone, exact[at])
        assert 0 < own_error < 0.2
        assert relative(batched[at], exact[at]) <= 1.1 * own_error
        assert relative(batched[at], alone) <= math.sqrt(2) * own_error


@pytest.mark.parametrize("path", ["eager", "graph"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30], ids=str)
def test_a_row_gone_wrong_leaves_its_neighbours_their_bits(
    fp8: Mmdit, inputs: Inputs, wrong: float, path: str
):
    shape = SIDE, SIDE, inputs[2].shape[1], len(inputs[0])
    if path == "graph":
        fp8.prepare(*shape)
    assert fp8.path(*shape) == path
    healthy = fp8.velocity(*inputs)
    latents, sigmas, embeds, pooled = (each.clone() for each in inputs)
    for spoilt in (latents, embeds, pooled):
        spoilt[2] = wrong
    spoiled = fp8.velocity(latents, sigmas, embeds, pooled)
    others = [at for at in range(len(healthy)) if at != 2]
    assert torch.equal(spoiled[others], healthy[others])
    assert not torch.isfinite(spoiled[2]).all() or not torch.equal(spoiled[2], healthy[2])
    # And nothing of it is left in the graph's memory.
    assert torch.equal(fp8.velocity(*inputs), healthy)


def test_a_graph_gives_what_its_kernels_give_one_by_one(inputs: Inputs):
    shape = SIDE, SIDE, inputs[2].shape[1], len(inputs[0])
    found = {}
    for path in ("eager", "graph"):
        # One attention for both: left to a measurement, each might get another.
        switches = Optimizations(cuda_graphs=path == "graph", attention="efficient")
        mmdit = Mmdit.load(BUILTIN, "cuda", "auto", switches)
        mmdit.prepare(*shape)
        assert mmdit.path(*shape) == path
        found[path] = mmdit.velocity(*inputs)
        assert torch.equal(mmdit.velocity(*inputs), found[path])
    assert torch.equal(found["graph"], found["eager"])


def job(prompts: list[PromptEmbedding], at: int, **changes: object) -> DenoiseJob:
    made = DenoiseJob(
        job_id=str(at),
        image=0,
        width=256,
        height=256,
        num_inference_steps=6 + at % 3,
        guidance_scale=(1.0, 3.0, 4.5)[at % 3],
        sampler=("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")[at % 4],
        scheduler="normal",
        shift=3.0,
        seed=at,
        positive=prompts[at % len(prompts)],
        negative=prompts[3],
        preview_every=2,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def outcomes(engine: Engine, jobs: list[DenoiseJob]) -> list[Event]:
    ears: list[queue.Queue[Event]] = [queue.Queue() for _ in jobs]
    for each, ear in zip(jobs, ears, strict=True):
        engine.submit(each, ear.put)
    ends: list[Event] = []
    for ear in ears:
        while isinstance(event := ear.get(timeout=WAIT_S), StepProgress):
            pass
        ends.append(event)
    return ends


def test_a_mix_through_the_engine_fails_only_the_broken_one(
    fp8: Mmdit, prompts: list[PromptEmbedding]
):
    warmed = warm_up(fp8, [(256, 256)], len(prompts[0].prompt_embeds))
    assert warmed.costs.as_json()["costs"]
    assert warmed.memory.capacity_bytes > 0
    broken = replace(prompts[0], prompt_embeds=np.full_like(prompts[0].prompt_embeds, float("nan")))
    jobs = [job(prompts, at) for at in range(9)] + [job(prompts, 9, positive=broken)]
    meter = EnergyMeter(torch.device("cuda"))
    engine = Engine(
        fp8,
        max_waiting=16,
        costs=warmed.costs,
        memory=warmed.memory,
        policy=everyone,
        meter=meter if meter.is_available else None,
    )
    try:
        *good, bad = outcomes(engine, jobs)
        stats = engine.stats()
        engine.check_health()
    finally:
        engine.close()
    assert type(bad) is StageFailed
    for each in good:
        assert isinstance(each, Latents), each
        assert np.isfinite(each.latents).all()
        assert (each.joules is not None) == meter.is_available
    assert stats.last_path in ("graph", "eager")


def test_memory_that_runs_out_costs_rows_and_no_request(fp8: Mmdit, prompts: list[PromptEmbedding]):
    jobs = [job(prompts, at, width=512, height=512, guidance_scale=4.0) for at in range(12)]
    shape = TokenShape(64, 64, len(prompts[0].prompt_embeds))
    rows = torch.randn(4, 16, 64, 64)
    embeds = torch.randn(4, shape.text_tokens, fp8.joint_attention_dim)
    torch.cuda.reset_peak_memory_stats()
    fp8.velocity(rows, torch.ones(4), embeds, torch.randn(4, fp8.pooled_projection_dim))
    enough_for_four = torch.cuda.max_memory_reserved() + (64 << 20)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # A budget that hopes for far more than the allocator may take.
    engine = Engine(
        fp8, max_waiting=16, policy=everyone, memory=MemoryBudget(1 << 40, bytes_per_token=1.0)
    )
    torch.cuda.set_per_process_memory_fraction(enough_for_four / total)
    try:
        ends = outcomes(engine, jobs)
        assert engine.is_alive
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.close()
    assert [end for end in ends if not isinstance(end, Latents)] == []
