"""Cancelling, deadlines and priorities act at the next step, and nothing stays behind."""

import gc
import random
import threading
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch

from deployments.engine import Engine
from deployments.live_request import LiveRequest
from deployments.payloads import Latents
from deployments.ticket import Ticket
from serve.errors import DeadlineExceeded, JobCancelled
from tests.unit.toy_engine import (
    Clock,
    Gate,
    Listener,
    ToyModel,
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
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(model: ToyModel, clock: Clock) -> Iterator[Engine]:
    made = Engine(model, max_waiting=600, policy=everyone, clock=clock)
    yield made
    made.close()


def steps_told(events: Sequence[object]) -> int:
    return len(events) - 1


def test_cancelled_in_a_batch_it_leaves_at_the_next_step(engine, model):
    gate = Gate(model)
    staying, _ = submit(engine, job(steps=5, value=0.1))
    gate.wait()
    leaving, ticket = submit(engine, job(steps=5, value=0.2))

    def cancel_in_third(prompt_embeds: torch.Tensor) -> None:
        if len(model.calls) == 3:
            ticket.cancel()

    model.before = cancel_in_third
    gate.opened.set()
    events = leaving.rest()
    assert isinstance(events[-1], JobCancelled)
    assert steps_told(events) == 2  # the one under way is finished, no other begun
    finished(staying)
    assert [call.rows for call in model.calls] == [1, 2, 2, 1, 1]


def test_a_deadline_that_passes_ends_the_job_at_the_next_step(engine, model, clock):
    def pass_in_second(prompt_embeds: torch.Tensor) -> None:
        if len(model.calls) == 2:
            clock.now += 10

    model.before = pass_in_second
    events = submit(engine, job(steps=50, deadline_s=10.0))[0].rest()
    error = events[-1]
    assert isinstance(error, DeadlineExceeded)
    assert (error.field, error.value) == ("deadline_s", 10.0)
    assert steps_told(events) == 2
    assert len(model.calls) == 2
    assert engine.queue_length == 0


def test_a_deadline_passes_while_it_waits(engine, model, clock):
    gate = Gate(model)
    running, _ = submit(engine, job())
    gate.wait()
    waiting, _ = submit(engine, job(deadline_s=1.0, value=0.5))
    clock.now += 2
    gate.opened.set()
    assert isinstance(failure(waiting), DeadlineExceeded)
    finished(running)
    assert all(0.5 not in call.prompts for call in model.calls)


def test_a_deadline_that_is_kept_changes_nothing(engine):
    finished(submit(engine, job(deadline_s=0.5))[0])


def test_a_higher_priority_takes_the_next_step(model):
    engine = Engine(model, max_waiting=4)  # by the real policy
    try:
        gate = Gate(model)
        low, _ = submit(engine, job(steps=6, value=0.1))
        gate.wait()
        high, _ = submit(engine, job(steps=2, value=0.2, priority=5))
        gate.opened.set()
        finished(high)
        finished(low)
    finally:
        engine.close()
    # Whether they share its forwards is for the costs to say.
    assert pytest.approx(0.2) in model.calls[1].prompts
    assert pytest.approx(0.2) in model.calls[2].prompts


class Meter:
    """Reads the same again and again."""

    def since_last(self) -> float | None:
        return 1.0


@pytest.mark.parametrize("meter", [None, Meter()], ids=["no meter", "meter"])
def test_what_is_cancelled_is_gone_while_others_go_on(model, meter):
    engine = Engine(model, max_waiting=600, policy=everyone, meter=meter)
    left: list[str] = []
    tickets: list[Ticket] = []

    def cancel_then_look(prompt_embeds: torch.Tensor) -> None:
        if len(model.calls) == 3:
            for ticket in tickets:
                ticket.cancel()
        if len(model.calls) == 10:
            gc.collect()
            live = [each for each in gc.get_objects() if type(each) is LiveRequest]
            left.extend(each.ticket.job.job_id for each in live)

    try:
        gate = Gate(model)
        staying, _ = submit(engine, job(steps=12, job_id="staying"))
        gate.wait()
        listeners = []
        for _ in range(5):
            listener, ticket = submit(engine, job(steps=12, job_id="leaving"))
            listeners.append(listener)
            tickets.append(ticket)
        model.before = cancel_then_look
        gate.opened.set()
        assert all(isinstance(failure(listener), JobCancelled) for listener in listeners)
        finished(staying)
    finally:
        engine.close()
    assert "staying" in left
    assert "leaving" not in left


def test_hundreds_of_arrivals_and_cancels_leave_nothing_behind(model):
    threads = threading.active_count()
    engine = Engine(model, max_waiting=600)
    draw = random.Random(0)
    # Sizes that nothing else in this process uses, so that tensors can be told apart.
    sizes = [(48, 112), (112, 48), (48, 48)]
    mine = {(4, height // 8, width // 8) for width, height in sizes}
    listeners: list[Listener] = []
    tickets: list[Ticket] = []

    # In the engine's thread too, and by its own draws: whichever thread is first.
    draw_in_engine = random.Random(1)

    def maybe_cancel(prompt_embeds: torch.Tensor) -> None:
        if tickets and draw_in_engine.random() < 0.3:
            draw_in_engine.choice(tickets).cancel()

    model.before = maybe_cancel
    for _ in range(500):
        width, height = draw.choice(sizes)
        listener, ticket = submit(
            engine,
            job(
                steps=draw.randint(1, 6),
                job_id="crowd",
                width=width,
                height=height,
                value=draw.choice([0.1, 0.2, float("nan"), 1e9]),
                negative=draw.choice([None, prompt(0.3)]),
                sampler=draw.choice(["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde"]),
                priority=draw.randint(0, 2),
                deadline_s=draw.choice([None, None, 0.05]),
            ),
        )
        listeners.append(listener)
        tickets.append(ticket)
        if draw.random() < 0.2:
            draw.choice(tickets).cancel()
    ends = [listener.rest()[-1] for listener in listeners]
    assert len({type(end) for end in ends}) >= 3
    assert all(listener.events.empty() for listener in listeners)
    stats = engine.stats()
    assert (engine.queue_length, stats.live_requests, stats.waiting_requests) == (0, 0, 0)
    gone = [weakref.ref(ticket) for ticket in tickets]
    made = [end for end in ends if isinstance(end, Latents)]
    assert made
    del listeners[:], tickets[:], ends[:], made[:], listener, ticket
    # It is alive all the while. What it did last may linger until it has done something else.
    finished(submit(engine, job())[0])
    gc.collect()
    assert [ref for ref in gone if ref() is not None] == []
    objects = gc.get_objects()
    requests = [each.ticket.job.job_id for each in objects if type(each) is LiveRequest]
    assert "crowd" not in requests
    shapes = {tuple(each.shape) for each in objects if type(each) is torch.Tensor}
    assert not {shape for shape in shapes if shape[-3:] in mine}
    engine.close()
    assert threading.active_count() == threads
