"""What an engine tells of its work and speed: a baseline that learns, sizes at work, rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engine_load import LoadMeter
from deployments.step_costs import StepCosts, TokenShape
from tests.unit import toy_engine as toy

SHAPE = TokenShape(4, 8, 3)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Card:
    """Forwards of one shape, which start-up found to take so long."""

    def __init__(self, found_s: float) -> None:
        costs = StepCosts()
        for rows in (1, 2):
            costs.observe(SHAPE, rows, found_s * rows)
        self.clock = Clock()
        self.meter = LoadMeter(costs, self.clock, SHAPE)

    def runs(self, *seconds: float, times: int = 1, gap_s: float = 0.2) -> None:
        for _ in range(times):
            for each in seconds:
                self.clock.now += gap_s
                self.meter.took(SHAPE, 1, each)

    @property
    def load(self) -> Any:
        return self.meter.load((), 1.0)


def test_who_started_on_a_warm_card_learns_its_cool_speed() -> None:
    card = Card(0.4)
    before = card.meter.cool_seconds(toy.job())
    card.runs(0.4, times=20)
    assert card.load.slowdown == pytest.approx(1.0)
    assert card.load.step_s == pytest.approx(0.8)
    card.runs(0.2, times=80)
    assert card.load.slowdown == pytest.approx(1.0)
    assert card.load.step_s == pytest.approx(0.4)
    assert card.meter.cool_seconds(toy.job()) == pytest.approx(before / 2)
    card.runs(0.4, times=80)
    assert card.load.slowdown == pytest.approx(2.0)
    assert card.load.step_s == pytest.approx(0.4)


def test_a_moments_luck_is_no_baseline() -> None:
    card = Card(0.2)
    card.runs(0.1, times=200, gap_s=0.001)  # all within a fifth of a second
    assert card.load.step_s == pytest.approx(0.4)
    card = Card(0.2)
    card.runs(0.18, 0.2, 0.22, 0.196, times=40)
    assert card.load.step_s == pytest.approx(0.4)


def test_sizes_at_work_and_rows_are_told_while_there_is_work() -> None:
    card = Card(0.2)
    card.meter.took(SHAPE, 4, 0.5)
    ticket: Any = SimpleNamespace(key=1, job=toy.job())
    job = ticket.job
    told = card.meter.load([ticket], 1.0)
    assert told.holds == {f"size {job.width}x{job.height}"}
    assert told.rows == 4
    assert (card.load.holds, card.load.rows) == (frozenset(), 0)
