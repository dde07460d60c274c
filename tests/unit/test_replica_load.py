"""What a replica tells of itself: counted right, carried as numbers, and never an exception."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.heat_reading import Reading
from cluster.pool_state import ReplicaState
from cluster.reported_numbers import as_numbers, from_numbers
from cluster.work_sizes import WorkSizes
from deployments.card_heat import reasons_in_words
from deployments.engine_load import EngineLoad
from deployments.replica_load import CallMeter, Statistics, replica_state

_FINITE = st.floats(0, 1e6)
_STATES = st.builds(
    ReplicaState,
    id=st.just("r"),
    waiting_s=_FINITE,
    running_s=_FINITE,
    requests=_FINITE,
    accepted=_FINITE,
    accepted_s=_FINITE,
    slowdown=st.none() | st.floats(0.1, 100),
    duty=st.floats(0, 1),
    margin_c=st.none() | st.floats(-50, 100),
    throttled=st.booleans(),
    power_w=st.none() | _FINITE,
    reading_age_s=st.none() | _FINITE,
)


@given(_STATES, st.floats(0, 100))
def test_a_state_survives_being_carried_as_numbers(state: ReplicaState, age_s: float):
    numbers = as_numbers(state)
    assert all(type(value) is float for value in numbers.values()), "Serve takes nothing else"
    assert from_numbers("r", numbers, age_s) == replace(state, age_s=age_s)


def test_numbers_of_another_version_are_no_obstacle():
    state = from_numbers("r", {"waiting_s": 1.0, "colour": 7.0}, 0.0)
    assert state == ReplicaState("r", waiting_s=1.0)


def test_calls_are_counted_from_coming_to_their_end():
    meter = CallMeter()
    assert meter.load().waiting_s == 0
    meter.came()
    meter.began()
    meter.took(2.0)
    meter.ended()
    meter.took(4.0)
    meter.took(3.0)
    for _ in range(3):
        meter.came()
    meter.began()
    load = meter.load()
    assert (load.waiting_s, load.running_s, load.requests) == (6.0, 3.0, 3)
    assert (load.accepted, load.accepted_s) == (4, 9.0), "the first came before any was measured"
    meter.left()
    meter.left()
    meter.ended()
    assert meter.load().requests == 0


def test_the_state_says_what_the_card_says():
    reading = Reading(at=1.0, temperature_c=85, margin_c=2, power_w=300, clocks_event_reasons=0x20)
    load = EngineLoad(waiting_s=3.0, slowdown=1.5, duty=0.5)
    state = replica_state("r", load, reading, 0.25)
    assert (state.margin_c, state.throttled, state.power_w) == (2, True, 300)
    assert state.reading_age_s == 0.25
    assert state.speed == pytest.approx(0.5 / 1.5)
    without = replica_state("r", load)
    assert without.margin_c is without.power_w is without.reading_age_s is None
    assert not without.throttled


def test_statistics_never_fail():
    def broken() -> Any:
        raise RuntimeError("the engine is gone")

    assert Statistics(broken).numbers() == {}
    assert Statistics(lambda: ReplicaState("r")).numbers()["duty"] == 1.0


def test_reasons_are_told_in_words():
    assert reasons_in_words(None) is None
    assert reasons_in_words(0) == []
    assert reasons_in_words(0x04 | 0x40) == ["software power cap", "hardware thermal slowdown"]


def test_the_work_of_a_picture_is_learnt_by_its_size():
    sizes = WorkSizes()
    assert sizes.cool_s((64, 64), 10) is None
    sizes.learn((64, 64), 10, 2.0)
    assert sizes.cool_s((64, 64), 20) == pytest.approx(4.0)
    assert sizes.cool_s((128, 64), 20) is None
    for _ in range(30):
        sizes.learn((64, 64), 1, 0.4)
    assert sizes.cool_s((64, 64), 1) == pytest.approx(0.4, rel=1e-3)
    sizes.learn((64, 64), 1, math.nan)
    sizes.learn((64, 64), 0, 1.0)
    assert sizes.cool_s((64, 64), 1) == pytest.approx(0.4, rel=1e-3)
