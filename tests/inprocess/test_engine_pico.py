"""Alone equals batched, on real classes: the mix a request is computed in must not show.

"The same picture" is meant as Pixels: float32 on a CPU, at most 1/255 off on 99.9 % of pixels.
"""

import gc
import queue
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deployments.builtin.pico import write_pico
from deployments.engine import Engine
from deployments.input_limits import InputLimits
from deployments.live_request import LiveRequest
from deployments.payloads import (
    DenoiseEvent,
    DenoiseJob,
    Latents,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.schedule import TokenShape, Work
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.text import TextEncoders
from deployments.sd3.vae import VaeDecoder
from deployments.step_costs import StepCosts
from deployments.warm_up import text_tokens_of, warm_up
from serve.errors import ConfigurationError, StageFailed

WAIT_S = 60
TEXT_LENGTH = 16
NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
PROMPTS = ("a red circle", "two blue squares left of a star", "", "green")
Event = DenoiseEvent | BaseException


@dataclass
class World:
    model_dir: Path
    mmdit: Mmdit
    vae: VaeDecoder
    prompts: list[PromptEmbedding]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = write_pico(tmp_path_factory.mktemp("model") / "pico", seed=0)
    encoders = TextEncoders.load(folder, "cpu", "fp32")
    encoded = encoders.encode([TextJob(text, text, text, TEXT_LENGTH) for text in PROMPTS])
    return World(
        folder,
        Mmdit.load(folder, "cpu", "fp32"),
        VaeDecoder.load(folder, "cpu", "fp32"),
        [PromptEmbedding(e.prompt_embeds, e.pooled_prompt_embeds, (), NOBODY) for e in encoded],
    )


def random_job(draw: random.Random, world: World) -> DenoiseJob:
    width, height = draw.choice([(64, 64), (64, 64), (96, 64)])
    low = draw.uniform(0.0, 0.5)
    return DenoiseJob(
        job_id="mixed",
        image=0,
        width=width,
        height=height,
        num_inference_steps=draw.randint(2, 6),
        guidance_scale=draw.choice([1.0, 2.0, 4.5, 7.0]),
        sampler=draw.choice(["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"]),
        scheduler=draw.choice(["normal", "simple", "sgm_uniform", "beta"]),
        shift=draw.choice([1.0, 3.0]),
        seed=draw.randrange(2**32),
        positive=draw.choice(world.prompts),
        negative=draw.choice([None, *world.prompts]),
        guidance_interval=draw.choice([None, None, (low, low + 0.4)]),
        negative_prompt_range=draw.choice([(0.0, 1.0), (0.0, 0.1), (0.3, 0.8)]),
        preview_every=draw.choice([0, 0, 2]),
    )


def random_policy(seed: int) -> Callable[..., tuple[int, ...]]:
    """Any subset of any shape: what a forward holds must not matter."""
    draw = random.Random(seed)

    def choose(
        works: Sequence[Work], costs: StepCosts, now: float, row_limit: Callable[[TokenShape], int]
    ) -> tuple[int, ...]:
        if not works:
            return ()
        shape = draw.choice(sorted({work.shape for work in works}, key=str))
        keys = [work.key for work in works if work.shape == shape]
        return tuple(draw.sample(keys, draw.randint(min(2, len(keys)), len(keys))))

    return choose


def run(engine: Engine, jobs: Sequence[DenoiseJob]) -> list[NDArray[np.float32]]:
    ears: list[queue.Queue[Event]] = [queue.Queue() for _ in jobs]
    for job, ear in zip(jobs, ears, strict=True):
        engine.submit(job, ear.put)
    return [latents_of(ear) for ear in ears]


def latents_of(ear: "queue.Queue[Event]") -> NDArray[np.float32]:
    last = last_of(ear)
    assert isinstance(last, Latents), last
    return last.latents


def last_of(ear: "queue.Queue[Event]") -> Event:
    while isinstance(event := ear.get(timeout=WAIT_S), StepProgress):
        pass
    return event


def test_fifty_random_mixes_give_the_pictures_their_requests_give_alone(world: World):
    draw = random.Random(7)
    jobs = [random_job(draw, world) for _ in range(40)]
    engine = Engine(world.mmdit, max_waiting=1)
    try:
        alone = [run(engine, [job])[0] for job in jobs]
    finally:
        engine.close()
    pixels = [world.vae.decode(latents) for latents in alone]
    largest_forward, worst = 0, 0.0
    for mix in range(50):
        chosen = draw.sample(range(len(jobs)), draw.randint(2, 6))
        engine = Engine(world.mmdit, max_waiting=8, policy=random_policy(mix))
        try:
            batched = run(engine, [jobs[at] for at in chosen])
            rows = [entry["rows"] for entry in engine.measured()["costs"]]
        finally:
            engine.close()
        largest_forward = max(largest_forward, *rows)
        for at, latents in zip(chosen, batched, strict=True):
            worst = max(worst, float(np.abs(latents - alone[at]).max()))
            off = np.abs(world.vae.decode(latents).astype(int) - pixels[at].astype(int))
            assert (off <= 1).mean() >= 0.999, jobs[at]
    assert worst < 1e-3
    assert largest_forward >= 6
    assert len({picture.tobytes() for picture in pixels}) == len(pixels)  # they do differ


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30], ids=str)
def test_a_row_gone_wrong_leaves_its_neighbours_their_bits(
    world: World, precision: str, wrong: float
):
    mmdit = world.mmdit if precision == "fp32" else Mmdit.load(world.model_dir, "cpu", precision)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, mmdit.in_channels, 8, 8, generator=generator)
    sigmas = torch.tensor([0.9, 0.7, 0.5, 0.3])
    prompts = torch.stack([torch.from_numpy(p.prompt_embeds) for p in world.prompts])
    pooled = torch.stack([torch.from_numpy(p.pooled_prompt_embeds) for p in world.prompts])
    healthy = mmdit.velocity(latents, sigmas, prompts, pooled)
    for spoilt in (latents, prompts, pooled):
        spoilt[1] = wrong
    spoiled = mmdit.velocity(latents, sigmas, prompts, pooled)
    assert torch.equal(spoiled[[0, 2, 3]], healthy[[0, 2, 3]])
    assert not torch.equal(spoiled[1], healthy[1])


def test_nan_in_a_prompt_fails_that_request_alone(world: World):
    draw = random.Random(3)
    jobs = [replace(random_job(draw, world), width=64, height=64) for _ in range(3)]
    nothing = world.prompts[0]
    broken = replace(nothing, prompt_embeds=np.full_like(nothing.prompt_embeds, np.nan))
    engine = Engine(world.mmdit, max_waiting=8, policy=random_policy(1))
    try:
        ears: list[queue.Queue[Event]] = [queue.Queue() for _ in range(4)]
        for job, ear in zip([*jobs, replace(jobs[0], positive=broken)], ears, strict=True):
            engine.submit(job, ear.put)
        for ear in ears[:3]:
            assert np.isfinite(latents_of(ear)).all()
        error = last_of(ears[3])
    finally:
        engine.close()
    assert type(error) is StageFailed
    assert "NaN" in str(error)


def test_hundreds_of_arrivals_and_cancels_leak_nothing(world: World):
    threads = threading.active_count()
    draw = random.Random(11)
    engine = Engine(world.mmdit, max_waiting=500, policy=random_policy(2))
    ears: list[queue.Queue[Event]] = []
    for _ in range(500):
        ear: queue.Queue[Event] = queue.Queue()
        steps = draw.randint(1, 3)
        job = replace(random_job(draw, world), job_id="crowd", num_inference_steps=steps)
        ticket = engine.submit(job, ear.put)
        ears.append(ear)
        if draw.random() < 0.5:
            ticket.cancel()
    ends = [type(last_of(ear)).__name__ for ear in ears]
    assert set(ends) == {"Latents", "JobCancelled"}
    stats = engine.stats()
    assert (engine.queue_length, stats.live_requests, stats.waiting_requests) == (0, 0, 0)
    engine.close()
    assert threading.active_count() <= threads  # those of tests before may end meanwhile
    del engine, ticket
    gc.collect()
    left = [each for each in gc.get_objects() if type(each) is LiveRequest]
    assert not [each for each in left if each.ticket.job.job_id == "crowd"]


def test_start_up_measures_what_the_policy_decides_by(world: World):
    tokens = text_tokens_of(world.model_dir, TEXT_LENGTH)
    assert tokens == len(world.prompts[0].prompt_embeds)
    warmed = warm_up(world.mmdit, [(64, 64)], tokens)
    entries = warmed.costs.as_json()["costs"]
    assert entries
    assert {(entry["height"], entry["width"]) for entry in entries} == {(8, 8)}
    assert {1, 2} <= {entry["rows"] for entry in entries}
    assert {entry["text_tokens"] for entry in entries} == {tokens}
    with pytest.raises(ConfigurationError, match="larger than the model"):
        warm_up(world.mmdit, [(16 * 1024, 64)], tokens)


def test_the_models_own_limits_refuse_what_it_cannot_take(world: World):
    limits = InputLimits(
        world.mmdit.joint_attention_dim,
        world.mmdit.pooled_projection_dim,
        world.mmdit.largest_side,
    )
    job = random_job(random.Random(0), world)
    limits.check(job)
    narrow = replace(job.positive, prompt_embeds=job.positive.prompt_embeds[:, :-1].copy())
    with pytest.raises(StageFailed):
        limits.check(replace(job, positive=narrow))
