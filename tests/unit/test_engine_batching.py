"""What shares a forward: anything of one token shape, each at its own step, by its own rules."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from deployments.engine import Engine
from deployments.payloads import DenoiseJob, Latents, StepProgress
from deployments.sd3.previews import latents_to_rgb
from deployments.sd3.sigmas import make_sigmas
from serve.errors import JobCancelled, StageFailed, StageUnavailable
from tests.unit.toy_engine import (
    Gate,
    Listener,
    ToyModel,
    alone,
    everyone,
    failure,
    finished,
    job,
    prompt,
    submit,
)


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture
def engine(model: ToyModel) -> Iterator[Engine]:
    made = Engine(model, max_waiting=16, policy=everyone)
    yield made
    made.close()


def together(engine: Engine, model: ToyModel, jobs: list[DenoiseJob]) -> list[Listener]:
    """Submit jobs so that their first forward is shared; the first forward of all is another's."""
    gate = Gate(model)
    first, _ = submit(engine, job(steps=1, value=99.0))
    gate.wait()
    listeners = [submit(engine, each)[0] for each in jobs]
    model.before = lambda prompt_embeds: None
    gate.opened.set()
    finished(first)
    return listeners


MIX = [
    job(steps=3, value=0.1),
    job(steps=5, value=0.2, negative=prompt(0.7), sampler="dpmpp_2m", seed=6),
    job(steps=4, value=0.3, negative=prompt(0.8), guidance_scale=6.0, scheduler="simple"),
    job(
        steps=4,
        value=0.4,
        negative=prompt(0.9),
        guidance_scale=1.0,
        sampler="euler_ancestral",
        seed=7,
    ),
    job(steps=6, value=0.5, negative=prompt(0.6), sampler="dpmpp_2m_sde", shift=1.5),
    job(steps=5, value=0.6, negative=prompt(0.5), guidance_interval=(0.3, 0.8)),
    job(steps=5, value=0.7, negative=prompt(0.4), negative_prompt_range=(0.0, 0.2)),
    job(steps=4, value=0.8, preview_every=2, scheduler="beta"),
]


def test_requests_that_differ_in_everything_share_forwards_and_get_what_they_get_alone(
    engine, model
):
    previews = replace(MIX[-1], preview_every=0)  # four channels: no map of SD3.5's
    mix = [*MIX[:-1], previews]
    listeners = together(engine, model, mix)
    for each, listener in zip(mix, listeners, strict=True):
        np.testing.assert_array_equal(finished(listener).latents, alone(each))
    first, second = model.calls[1], model.calls[2]
    # The negative prompt's row comes first; none at a scale of 1, nor outside the interval, which
    # begins below the first noise level.
    assert np.allclose(first.prompts, [0.1, 0.7, 0.2, 0.8, 0.3, 0.4, 0.6, 0.5, 0.6, 0.4, 0.7, 0.8])
    assert len(set(second.sigmas)) > 3
    assert max(call.rows for call in model.calls) > 10
    assert len(model.calls) == 1 + 6  # the longest of them


def test_shapes_do_not_mix(engine, model):
    jobs = [job(value=0.1), job(value=0.2, width=32), job(value=0.3), job(value=0.4, width=32)]
    for each, listener in zip(jobs, together(engine, model, jobs), strict=True):
        np.testing.assert_array_equal(finished(listener).latents, alone(each))
    assert {call.latents[1:] for call in model.calls} == {(4, 4, 8), (4, 4, 4)}
    assert max(call.rows for call in model.calls) == 2


def test_a_newcomer_joins_at_the_next_step(engine, model):
    gate = Gate(model)
    running, _ = submit(engine, job(steps=6, value=0.1))
    gate.wait()
    joining, _ = submit(engine, job(steps=2, value=0.2))
    gate.opened.set()
    finished(running)
    finished(joining)
    assert [call.rows for call in model.calls] == [1, 2, 2, 1, 1, 1]


def test_outside_the_guidance_interval_only_the_conditional_row_is_computed(engine, model):
    low, high = 0.4, 0.9
    guided = job(steps=8, value=0.5, negative=prompt(0.25), guidance_interval=(low, high))
    finished(submit(engine, guided)[0])
    sigmas = make_sigmas("normal", 8, 3.0)[:-1]
    inside = [bool(low <= sigma <= high) for sigma in sigmas]
    assert set(inside) == {True, False}
    assert [call.rows for call in model.calls] == [2 if each else 1 for each in inside]
    assert all(call.prompts[-1] == 0.5 for call in model.calls)


def test_outside_its_range_the_negative_prompt_is_zeros(engine, model):
    ranged = job(steps=10, value=0.5, negative=prompt(0.25), negative_prompt_range=(0.0, 0.1))
    finished(submit(engine, ranged)[0])
    # ComfyUI's percent_to_sigma at 10 % with shift 3.
    edge = 3 * 0.9 / (1 + 2 * 0.9)
    expected = [0.25 if sigma >= edge else 0.0 for sigma in make_sigmas("normal", 10, 3.0)[:-1]]
    assert expected[0] == 0.25
    assert expected[-1] == 0.0
    assert [call.prompts[0] for call in model.calls] == expected
    assert {call.rows for call in model.calls} == {2}


def test_a_whole_range_and_a_whole_interval_change_nothing(engine):
    plain = job(steps=5, negative=prompt(0.25))
    whole = replace(plain, guidance_interval=(0.0, 1.0), negative_prompt_range=(0.0, 1.0))
    a, b = (finished(submit(engine, each)[0]).latents for each in (plain, whole))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, -1e6], ids=str)
def test_a_row_gone_wrong_fails_alone_and_leaves_its_neighbours_their_bytes(engine, model, value):
    listeners = together(engine, model, [MIX[1], job(value=value), MIX[2]])
    assert type(failure(listeners[1])) is StageFailed
    for each, listener in ((MIX[1], listeners[0]), (MIX[2], listeners[2])):
        np.testing.assert_array_equal(finished(listener).latents, alone(each))
    assert model.calls[1].rows == 5  # they did share a forward


def test_an_exception_is_traced_to_the_request_that_causes_it(engine, model):
    def poison(prompt_embeds: torch.Tensor) -> None:
        if bool((prompt_embeds == 13).any()):
            raise ValueError("unlucky")

    gate = Gate(model)
    first, _ = submit(engine, job(steps=1))
    gate.wait()
    jobs = [job(value=0.5), job(value=13.0), job(value=0.25)]
    listeners = [submit(engine, each)[0] for each in jobs]
    model.before = poison
    gate.opened.set()
    finished(first)
    assert "unlucky" in str(failure(listeners[1]))
    for at in (0, 2):
        np.testing.assert_array_equal(finished(listeners[at]).latents, alone(jobs[at]))


def test_those_that_shared_a_lost_cards_last_forward_may_go_elsewhere(engine, model):
    gate = Gate(model)
    first, _ = submit(engine, job(steps=1))
    gate.wait()
    listeners = [submit(engine, job())[0] for _ in range(3)]

    def fail(prompt_embeds: torch.Tensor) -> None:
        raise torch.AcceleratorError("CUDA error: device is lost")

    model.before = fail
    gate.opened.set()
    finished(first)
    assert {type(failure(listener)) for listener in listeners} == {StageUnavailable}
    assert "device is lost" in str(engine.ended_because)


def test_progress_says_how_it_was_computed_and_shows_what_will_be(model):
    model.in_channels = 16
    engine = Engine(model, max_waiting=4)
    try:
        events = submit(engine, job(steps=5, preview_every=2, negative=prompt(0.5)))[0].rest()
    finally:
        engine.close()
    steps = [event for event in events if isinstance(event, StepProgress)]
    assert {event.path for event in steps} == {"graph"}
    assert [event.preview is not None for event in steps] == [False, True, False, True, False]
    # denoised = latents - sigma * velocity, and velocity is latents + 2 here.
    sigmas = make_sigmas("normal", 5, 3.0)
    latents = _euler(5, sigmas, until=3)
    denoised = latents - float(sigmas[3]) * (latents + 2.0)
    np.testing.assert_array_equal(steps[3].preview, latents_to_rgb(denoised))
    last = events[-1]
    assert isinstance(last, Latents)
    assert last.joules is None


def _euler(seed: int, sigmas: np.ndarray, until: int) -> torch.Tensor:
    from deployments.sd3.noise import initial_latents, request_generator

    latents = initial_latents(request_generator(seed), 16, 4, 8)
    for step in range(until):
        difference = float(sigmas[step + 1]) - float(sigmas[step])
        latents = latents + difference * (latents + 2.0)
    return latents


class FakeMeter:
    """Ten joules between any two readings."""

    def __init__(self) -> None:
        self.readings = 0

    def since_last(self) -> float | None:
        self.readings += 1
        return 10.0


def test_energy_is_shared_by_rows_and_tokens(model):
    engine = Engine(model, max_waiting=16, policy=everyone, meter=FakeMeter())
    try:
        # One row a step beside two: they end in the same forward, and the first end's reading is
        # shared over both.
        jobs = [job(steps=4, value=0.1), job(steps=4, value=0.2, negative=prompt(0.3))]
        single, double = (finished(listener) for listener in together(engine, model, jobs))
        stats = engine.stats()
    finally:
        engine.close()
    assert single.joules == pytest.approx(10 / 3)
    assert double.joules == pytest.approx(20 / 3)
    assert stats.joules == pytest.approx(20)  # with the one that came first


def test_a_cancelled_requests_energy_is_nobody_elses(model):
    engine = Engine(model, max_waiting=16, policy=everyone, meter=FakeMeter())
    try:
        gate = Gate(model)
        staying, _ = submit(engine, job(steps=3, value=0.1))
        gate.wait()
        leaving, ticket = submit(engine, job(steps=4, value=0.2))

        def cancel(prompt_embeds: torch.Tensor) -> None:
            ticket.cancel()

        model.before = cancel
        gate.opened.set()
        assert isinstance(failure(leaving), JobCancelled)
        made = finished(staying)
    finally:
        engine.close()
    # Three steps of four; the other's one, in the second forward, is not shared out.
    assert made.joules == pytest.approx(7.5)


def test_what_forwards_took_is_measured_and_told(engine, model):
    assert engine.stats().last_forward_ms is None
    finished(submit(engine, job(steps=3))[0])
    finished(submit(engine, job(steps=3, negative=prompt(0)))[0])
    stats = engine.stats()
    assert (stats.forwards, stats.last_rows, stats.last_path) == (6, 2, "graph")
    assert (stats.live_requests, stats.waiting_requests) == (0, 0)
    assert stats.last_forward_ms is not None
    assert stats.last_forward_ms > 0
    measured = {(entry["rows"], entry["width"]) for entry in engine.measured()["costs"]}
    assert measured == {(1, 8), (2, 8)}
