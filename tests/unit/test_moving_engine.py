"""A request that goes on in another engine ends with the latents that it would have had."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine import Engine
from deployments.payloads import Checkpoint, DenoiseJob, Handover, Latents, StepProgress
from serve.move_errors import CheckpointRefused
from tests.unit import toy_engine as toy

SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Start engines; all are closed in the end."""
    started: list[Engine] = []

    def new(**options: Any) -> Engine:
        started.append(
            Engine(options.pop("model", None) or toy.ToyModel(), max_waiting=8, **options)
        )
        return started[-1]

    yield new
    for engine in started:
        engine.close()


def run(job: DenoiseJob, every: int = 0) -> tuple[list[StepProgress], Latents]:
    """Run one job in an engine of its own."""
    engine = Engine(toy.ToyModel(), max_waiting=1, checkpoint_every=every)
    try:
        *steps, last = toy.submit(engine, job)[0].rest()
    finally:
        engine.close()
    assert isinstance(last, Latents), last
    return [step for step in steps if isinstance(step, StepProgress)], last


def checkpoints(steps: list[StepProgress]) -> list[Checkpoint]:
    return [step.checkpoint for step in steps if step.checkpoint is not None]


def as_sent(checkpoint: Checkpoint) -> Checkpoint:
    """What comes through Ray: arrays of another process, read-only."""
    copies: dict[str, Any] = {
        name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
        for name, array in vars(checkpoint).items()
        if isinstance(array, np.ndarray)
    }
    return replace(checkpoint, **copies)


@settings(deadline=None, max_examples=25)
@given(
    sampler=st.sampled_from(SAMPLERS),
    scheduler=st.sampled_from(["normal", "simple", "sgm_uniform", "beta"]),
    steps=st.integers(2, 12),
    seed=st.integers(0, 2**64 - 1),
    guided=st.booleans(),
    strength=st.sampled_from([None, 0.3, 0.75, 1.0]),
)
def test_from_any_step_on_the_latents_are_the_same(
    sampler: str, scheduler: str, steps: int, seed: int, guided: bool, strength: float | None
):
    job = toy.job(
        steps=steps,
        sampler=sampler,
        scheduler=scheduler,
        seed=seed,
        negative=toy.prompt(-0.5) if guided else None,
        guidance_interval=(0.2, 0.9),
    )
    if strength is not None:
        job = replace(job, init=toy.image(0.5), strength=strength)
    steps = job.steps
    told, undisturbed = run(job, every=1)
    taken = checkpoints(told)
    assert [each.step for each in taken] == list(range(1, steps - 1))
    for each in taken:
        resumed, latents = run(replace(job, resume=as_sent(each)))
        assert [step.step for step in resumed] == list(range(each.step + 1, steps + 1))
        np.testing.assert_array_equal(latents.latents, undisturbed.latents)


def test_checkpoints_come_every_few_steps_one_step_late():
    told, _ = run(toy.job(steps=12), every=5)
    assert [(step.step, step.checkpoint.step) for step in told if step.checkpoint] == [
        (6, 5),
        (11, 10),
    ]
    assert not checkpoints(run(toy.job(steps=12))[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_checkpoint_of_the_largest_usual_picture_takes_at_most_two_mib(sampler: str):
    told, _ = run(toy.job(steps=3, sampler=sampler, width=1024, height=1024), every=1)
    (checkpoint,) = checkpoints(told)
    arrays = [each for each in vars(checkpoint).values() if isinstance(each, np.ndarray)]
    # The toy's latents have 4 channels, SD3.5's have 16.
    latents = sum(each.nbytes for each in arrays if each.dtype == np.float32)
    rest = sum(each.nbytes for each in arrays if each.dtype != np.float32)
    assert 4 * latents <= 2 << 20
    assert rest <= 8192


def test_who_leaves_hands_everything_over_and_another_engine_goes_on(start):
    leaving = threading.Event()
    model = toy.ToyModel()
    gate = toy.Gate(model)
    engine = start(model=model, leaving=leaving.is_set, policy=toy.one_at_a_time)
    jobs = [toy.job(steps=6, sampler="dpmpp_2m_sde", seed=seed) for seed in (1, 2)]
    running, _ = toy.submit(engine, jobs[0])
    waiting, _ = toy.submit(engine, jobs[1])
    gate.wait()
    leaving.set()
    gate.opened.set()
    *steps, last = running.rest()
    assert [step.step for step in steps if isinstance(step, StepProgress)] == [1]
    assert isinstance(last, Handover)
    assert last.checkpoint is not None
    assert last.checkpoint.step == 1
    (unbegun,) = waiting.rest()
    assert unbegun == Handover(None)
    late, _ = toy.submit(engine, replace(jobs[0], resume=last.checkpoint))
    (handed_back,) = late.rest()
    assert isinstance(handed_back, Handover)
    assert handed_back.checkpoint is last.checkpoint
    assert engine.is_alive
    assert engine.queue_length == 0
    _, latents = run(replace(jobs[0], resume=as_sent(last.checkpoint)))
    np.testing.assert_array_equal(latents.latents, toy.alone(jobs[0]))


def test_nothing_but_the_steps_left_is_counted_as_work(start):
    (checkpoint,) = checkpoints(run(toy.job(steps=8), every=5)[0])
    engine = start()
    whole = engine.cool_seconds(toy.job(steps=8))
    resumed = engine.cool_seconds(toy.job(steps=8, resume=checkpoint))
    assert resumed == pytest.approx(whole * 3 / 8)


@pytest.mark.parametrize(
    ("of_job", "of_checkpoint", "field"),
    [
        ({"width": 96}, {}, "latents"),
        ({"sampler": "euler"}, {}, "sampler"),
        ({"num_inference_steps": 9}, {}, "steps"),
        ({"seed": 6}, {}, "seed"),
        ({"scheduler": "simple"}, {}, "scheduler"),
        ({"shift": 1.0}, {}, "shift"),
        ({"strength": 1.0, "num_inference_steps": 4}, {"steps": 4, "strength": 0.5}, "strength"),
        ({}, {"version": 1}, "version"),
        ({}, {"step": 8}, "step"),
        ({}, {"step": 0}, "step"),
        ({}, {"previous": None}, "previous"),
        ({}, {"latents": np.zeros((4, 4, 8), np.float64)}, "latents"),
        ({}, {"latents": np.full((4, 4, 8), np.nan, np.float32)}, "latents"),
        ({}, {"generator": np.zeros(3, np.uint8)}, "generator"),
    ],
)
def test_what_does_not_fit_is_refused(start, of_job, of_checkpoint, field):
    job = toy.job(steps=8, sampler="dpmpp_2m")
    (checkpoint,) = checkpoints(run(job, every=5)[0])
    engine = start()
    changed = replace(job, resume=replace(checkpoint, **of_checkpoint), **of_job)
    with pytest.raises(CheckpointRefused) as refused:
        engine.submit(changed, toy.Listener())
    assert refused.value.field == f"resume.{field}"
    assert engine.queue_length == 0
