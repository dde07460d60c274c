"""The engine under a governor, and what it tells of its work and speed."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cluster.governor import FREE, Allowance
from deployments.engine import Engine
from deployments.payloads import StepProgress
from deployments.step_costs import StepCosts, TokenShape
from serve.errors import DeadlineExceeded, JobCancelled
from tests.unit import toy_engine as toy

FORWARD_S = 0.02


class Slow:
    """A forward takes so long; `factor` more when the card is hot."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.began_at: list[float] = []

    def __call__(self, prompt_embeds: torch.Tensor) -> None:
        self.began_at.append(time.monotonic())
        time.sleep(FORWARD_S * self.factor)


def costs() -> StepCosts:
    measured = StepCosts()
    for rows in (1, 2, 4):
        measured.observe(TokenShape(4, 8, 3), rows, FORWARD_S * rows)
    return measured


@pytest.fixture
def model() -> toy.ToyModel:
    return toy.ToyModel()


@pytest.fixture
def start(model: toy.ToyModel) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(governor: Callable[[], Allowance] | None = None) -> Engine:
        engines.append(
            Engine(model, max_waiting=9, costs=costs(), governor=governor, policy=toy.one_at_a_time)
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_the_card_rests_for_its_share_of_the_time(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    slow = model.before = Slow()
    engine = start(lambda: Allowance(0.25, 2, "warm"))
    toy.finished(toy.submit(engine, toy.job(steps=5))[0])
    gaps = [
        later - earlier for earlier, later in zip(slow.began_at, slow.began_at[1:], strict=False)
    ]
    # A pause three times as long as the forward before it; a loaded machine makes both longer.
    assert min(gaps) >= 4 * FORWARD_S
    # Who does nothing is not held back.
    assert engine.load().duty == 1


def test_what_the_governor_allows_is_told_while_there_is_work(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    model.before = Slow()
    engine = start(lambda: Allowance(0.25, 2, "warm"))
    listener, _ = toy.submit(engine, toy.job(steps=9))
    listener.events.get(timeout=toy.WAIT_S)
    assert engine.load().duty == 0.25
    assert engine.allowance.reason == "warm"


def test_a_cancellation_is_heard_during_the_rest_and_a_lift_ends_it(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    model.before = Slow()
    allowed = [Allowance(0.0005, 2, "hot")]  # some 40 s
    engine = start(lambda: allowed[0])
    first, ticket = toy.submit(engine, toy.job(steps=9))
    second, _ = toy.submit(engine, toy.job(steps=2))
    assert isinstance(first.events.get(timeout=toy.WAIT_S), StepProgress)
    ticket.cancel()
    assert isinstance(first.events.get(timeout=5), JobCancelled)
    allowed[0] = FREE
    toy.finished(second)


def test_a_new_request_does_not_end_the_rest(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    slow = model.before = Slow()
    engine = start(lambda: Allowance(0.1, 2, "warm"))
    first, _ = toy.submit(engine, toy.job(steps=2))
    assert isinstance(first.events.get(timeout=toy.WAIT_S), StepProgress)
    toy.submit(engine, toy.job(steps=1))
    toy.finished(first)
    assert slow.began_at[1] - slow.began_at[0] >= 10 * FORWARD_S


def test_closing_does_not_wait_for_the_rest_to_end(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    model.before = Slow()
    engine = start(lambda: Allowance(0.0005, 2, "hot"))  # some 40 s
    listener, _ = toy.submit(engine, toy.job(steps=3))
    assert isinstance(listener.events.get(timeout=toy.WAIT_S), StepProgress)
    engine.close()
    assert isinstance(listener.rest()[-1], BaseException)
    assert len(model.calls) == 1


def test_rows_are_trimmed_but_one_request_always_fits(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    gate = toy.Gate(model)
    engine = Engine(
        model,
        max_waiting=9,
        costs=costs(),
        governor=lambda: Allowance(0.5, 2, "warm"),
        policy=toy.everyone,
    )
    try:
        listeners = [toy.submit(engine, toy.job(steps=2))[0] for _ in range(5)]
        gate.wait()
        gate.opened.set()
        for listener in listeners:
            toy.finished(listener)
    finally:
        engine.close()
    assert max(call.rows for call in model.calls) == 2


def test_a_deadline_missed_on_a_held_card_says_so(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    model.before = Slow()
    engine = start(lambda: Allowance(0.1, 2, "warm"))
    listener, _ = toy.submit(engine, toy.job(steps=50, deadline_s=0.3))
    failed = toy.failure(listener)
    assert isinstance(failed, DeadlineExceeded)
    assert "For heat the card computes 10%" in failed.message


def test_work_is_counted_in_cool_seconds(model: toy.ToyModel, start: Callable[..., Engine]) -> None:
    gate = toy.Gate(model)
    engine = start()
    assert engine.load().requests == 0
    toy.submit(engine, toy.job(steps=4))
    gate.wait()
    toy.submit(engine, toy.job(steps=6, negative=toy.prompt(0.0)))
    load = engine.load()
    assert load.requests == load.accepted == 2
    # One row a step, and two.
    assert load.accepted_s == pytest.approx(4 * FORWARD_S + 6 * 2 * FORWARD_S)
    assert load.waiting_s + load.running_s == pytest.approx(load.accepted_s)
    gate.opened.set()


def test_finished_work_leaves_nothing_behind(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    engine = start()
    for _ in range(3):
        toy.finished(toy.submit(engine, toy.job(steps=4))[0])
    load = engine.load()
    assert (load.waiting_s, load.running_s, load.requests) == (0, 0, 0)
    assert load.accepted == 3


def test_slowdown_is_told_against_what_start_up_measured(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    slow = model.before = Slow()
    engine = start()
    assert engine.load().slowdown is None
    slow.factor = 3.0
    toy.finished(toy.submit(engine, toy.job(steps=8))[0])
    slowdown = engine.load().slowdown
    assert slowdown is not None
    assert slowdown >= 3
    # The engine's own costs follow the card; what is cool stays what it was.
    assert engine.load().accepted_s == pytest.approx(8 * FORWARD_S)


def test_a_size_nobody_measured_tells_no_slowdown(
    model: toy.ToyModel, start: Callable[..., Engine]
) -> None:
    engine = start()
    toy.finished(toy.submit(engine, toy.job(steps=8, width=128, height=128))[0])
    assert engine.load().slowdown is None


def test_without_a_governor_the_card_is_free(start: Callable[..., Engine]) -> None:
    engine = start()
    toy.finished(toy.submit(engine, toy.job(steps=2))[0])
    assert engine.allowance.duty == 1


def test_stretched_costs_are_a_view() -> None:
    known, shape = costs(), TokenShape(4, 8, 3)
    assert known.stretched(1) is known
    twice = known.stretched(2)
    assert twice.seconds(shape, 2) == 2 * known.seconds(shape, 2)
    assert twice.prices(shape, 3) == tuple(2 * each for each in known.prices(shape, 3))
    with pytest.raises(ValueError, match="cannot take 0"):
        known.stretched(0)
