"""The engine's promises to each request, whatever happens to the others.

The model is a stand-in that does what a test tells it to; the loop, threads and events are real.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from deployments.engine import Engine
from deployments.input_limits import InputLimits
from deployments.payloads import DenoiseJob, Latents, StepProgress
from deployments.sd3 import previews
from deployments.sd3.noise import initial_latents, request_generator
from deployments.sd3.previews import LatentRgb
from serve.errors import (
    ConfigurationError,
    InvalidRequest,
    JobCancelled,
    Overloaded,
    StageFailed,
    StageUnavailable,
)
from tests.unit.toy_engine import (
    Clock,
    Event,
    Gate,
    Listener,
    ToyModel,
    alone,
    failure,
    finished,
    job,
    one_at_a_time,
    prompt,
    submit,
)

LIMITS = InputLimits(joint_attention_dim=8, pooled_projection_dim=5, largest_side=16)


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture
def engine(model: ToyModel) -> Iterator[Engine]:
    made = Engine(model, max_waiting=4, limits=LIMITS, policy=one_at_a_time)
    yield made
    made.close()


def test_every_step_is_told_in_order_and_the_latents_come_last(engine):
    events = submit(engine, job(steps=5))[0].rest()
    assert [event.step for event in events if isinstance(event, StepProgress)] == [1, 2, 3, 4, 5]
    assert {event.steps for event in events if isinstance(event, StepProgress)} == {5}
    last = events[-1]
    assert isinstance(last, Latents)
    assert last.latents.shape == (4, 4, 8)
    assert last.latents.dtype == np.float32
    assert last.stamp.precision == "fp32"


def test_one_euler_step_is_what_it_says(engine):
    noise = initial_latents(request_generator(5), 4, 4, 8)
    # One step goes from level 1 to 0: latents - velocity, and velocity is latents + 1.
    latents = finished(submit(engine, job(steps=1))[0]).latents
    np.testing.assert_allclose(latents, noise - (noise + 1), atol=1e-6)


def test_guidance_takes_two_rows_and_goes_from_negative_towards_positive(engine, model):
    guided = job(steps=1, value=1.0, negative=prompt(0.25), guidance_scale=3.0)
    latents = finished(submit(engine, guided)[0]).latents
    # velocity = latents + (.25 + 3 * (1 - .25))
    np.testing.assert_allclose(latents, -2.5, atol=1e-5)
    assert [call.rows for call in model.calls] == [2]


def test_without_guidance_one_row_is_taken(engine, model):
    submit(engine, job(steps=3))[0].rest()
    assert [call.rows for call in model.calls] == [1, 1, 1]


def test_requests_finish_in_the_order_they_came(engine, model):
    gate = Gate(model)
    order: list[int] = []

    def last_of(number: int) -> Callable[[Event], None]:
        return lambda event: None if isinstance(event, StepProgress) else order.append(number)

    for number in range(3):
        engine.submit(job(), last_of(number))
    listener, _ = submit(engine, job())
    gate.opened.set()
    finished(listener)
    assert order == [0, 1, 2]


def test_queue_length_counts_the_running_and_the_waiting(engine, model):
    gate = Gate(model)
    listeners = [submit(engine, job())[0]]
    gate.wait()
    listeners += [submit(engine, job())[0] for _ in range(2)]
    assert engine.queue_length == 3
    gate.opened.set()
    for listener in listeners:
        finished(listener)
    assert engine.queue_length == 0


def test_too_many_waiting_are_refused(engine, model):
    gate = Gate(model)
    listeners = [submit(engine, job())[0]]
    gate.wait()
    listeners += [submit(engine, job())[0] for _ in range(4)]
    with pytest.raises(Overloaded):
        submit(engine, job())
    gate.opened.set()
    for listener in listeners:
        finished(listener)


def test_a_running_request_stops_at_the_next_step(engine, model):
    gate = Gate(model)
    listener, ticket = submit(engine, job(steps=50))
    gate.wait()
    ticket.cancel()
    gate.opened.set()
    events = listener.rest()
    assert isinstance(events[-1], JobCancelled)
    assert len(model.calls) == 1
    assert engine.queue_length == 0


def test_a_waiting_request_is_cancelled_without_being_run(engine, model):
    gate = Gate(model)
    running, _ = submit(engine, job())
    gate.wait()
    waiting, ticket = submit(engine, job())
    ticket.cancel()
    gate.opened.set()
    events = waiting.rest()
    assert len(events) == 1
    assert isinstance(events[0], JobCancelled)
    finished(running)
    assert len(model.calls) == 4


def test_cancelling_what_is_done_does_nothing(engine):
    listener, ticket = submit(engine, job())
    finished(listener)
    ticket.cancel()
    finished(submit(engine, job())[0])
    assert listener.events.empty()


@pytest.mark.parametrize(
    "bad",
    [job(value=float("nan")), job(value=1e6), job(value=13.0), job(sampler="none such")],
    ids=["nan", "absurd", "exception", "unknown sampler"],
)
def test_a_bad_request_fails_alone(engine, model, bad):
    model.before = poison
    alone = finished(submit(engine, job())[0]).latents
    listeners = [submit(engine, each)[0] for each in (job(), bad, job())]
    assert np.array_equal(finished(listeners[0]).latents, alone)
    expected = InvalidRequest if bad.sampler == "none such" else StageFailed
    assert type(failure(listeners[1])) is expected
    assert np.array_equal(finished(listeners[2]).latents, alone)
    assert engine.is_alive


def embeddings(**changes: object) -> DenoiseJob:
    return job(positive=replace(prompt(1), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (embeddings(prompt_embeds=np.ones((3, 8), np.int32)), "positive.prompt_embeds"),
        (embeddings(prompt_embeds=np.ones((3, 9), np.float32)), "positive.prompt_embeds"),
        (embeddings(prompt_embeds=np.ones((0, 8), np.float32)), "positive.prompt_embeds"),
        (embeddings(prompt_embeds=[[1.0] * 8]), "positive.prompt_embeds"),
        (embeddings(pooled_prompt_embeds=np.ones((1, 5), np.float32)), "pooled_prompt_embeds"),
        (job(negative=replace(prompt(0), prompt_embeds=np.ones((9, 8), np.float32))), "negative"),
    ],
    ids=["dtype", "width", "empty", "no array", "pooled", "differs from the positive"],
)
def test_wrong_embeddings_are_refused_by_name(engine, model, bad, field):
    with pytest.raises(StageFailed, match="wrong (shape|dtype)") as raised:
        submit(engine, bad)
    assert field in str(raised.value.field)
    assert engine.queue_length == 0
    finished(submit(engine, job())[0])


@pytest.mark.parametrize(
    "size",
    [{"width": 0}, {"width": -16}, {"height": 40}, {"width": 144}, {"num_inference_steps": 0}],
    ids=str,
)
def test_impossible_sizes_are_refused_with_what_is_possible(engine, size):
    with pytest.raises(InvalidRequest) as raised:
        submit(engine, job(**size))
    assert raised.value.field in size
    assert raised.value.allowed


def poison(prompt_embeds: torch.Tensor) -> None:
    if bool((prompt_embeds == 13).any()):
        raise ValueError("unlucky")


def test_nan_names_the_step(engine, model):
    def nan_at_third(prompt_embeds: torch.Tensor) -> None:
        if len(model.calls) == 3:
            prompt_embeds.fill_(float("nan"))

    model.before = nan_at_third
    events = submit(engine, job(steps=6))[0].rest()
    assert len(events) == 3
    assert "step 3 of 6" in str(events[-1])


def test_a_listener_that_raises_harms_only_itself(engine):
    def broken(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit(job(steps=50), broken)
    finished(submit(engine, job())[0])
    assert engine.queue_length == 0


def test_close_ends_everything_with_a_typed_error(model):
    engine = Engine(model, max_waiting=4)
    gate = Gate(model)
    running, _ = submit(engine, job(steps=50))
    gate.wait()
    waiting, _ = submit(engine, job())
    model.before = lambda prompt_embeds: engine.close()
    gate.opened.set()
    assert type(failure(running)) is StageUnavailable
    assert type(failure(waiting)) is StageUnavailable
    with pytest.raises(StageUnavailable):
        engine.submit(job(), Listener())
    engine.close()
    assert len(model.calls) == 2


def test_the_same_job_twice_gives_the_same_bytes(engine):
    for sampler in ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"):
        each = [finished(submit(engine, job(sampler=sampler))[0]).latents for _ in range(2)]
        assert np.array_equal(each[0], each[1])


def test_a_preview_that_fails_leaves_the_picture_and_is_not_tried_again(model, monkeypatch, caplog):
    tried: list[object] = []

    def broken(*given: object) -> None:
        tried.append(given)
        raise ValueError("no such colours")

    expected = alone(job(steps=4))
    monkeypatch.setattr(previews, "latents_to_rgb", broken)
    four = LatentRgb(((0.0, 0.0, 0.0),) * 4)
    engine = Engine(model, max_waiting=4, latent_rgb=four)
    try:
        events = submit(engine, job(steps=4, preview_every=1))[0].rest()
    finally:
        engine.close()
    assert isinstance(events[-1], Latents)
    np.testing.assert_array_equal(events[-1].latents, expected)
    assert [event.preview for event in events if isinstance(event, StepProgress)] == [None] * 4
    assert len(tried) == 1
    assert [record.name for record in caplog.records] == ["deployments.sd3.previews"]


def test_a_map_for_another_number_of_channels_is_refused_at_start_up(model):
    with pytest.raises(ConfigurationError, match="3 channels"):
        Engine(model, max_waiting=1, latent_rgb=LatentRgb(((0.0, 0.0, 0.0),) * 3))


def test_waiting_for_the_first_forward_is_waiting_and_a_step_takes_what_its_forward_took(model):
    clock = Clock()
    engine = Engine(model, max_waiting=4, policy=one_at_a_time, clock=clock)

    def spend(prompt_embeds: torch.Tensor) -> None:
        clock.now += 2.0

    try:
        gate = Gate(model)
        first, _ = submit(engine, job(steps=3))
        gate.wait()
        second, _ = submit(engine, job(steps=2))
        model.before = spend
        gate.opened.set()
        finished(first)
        *steps, last = second.rest()
    finally:
        engine.close()
    # Two steps of the first were after the gate; it was live all the while, but none of its own.
    assert isinstance(last, Latents)
    assert (last.stamp.queue_s, last.stamp.seconds) == (4.0, 4.0)
    assert [step.seconds for step in steps if isinstance(step, StepProgress)] == [2.0, 2.0]
