"""Speeds of kinds and of replicas, from what each measures of one usual step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.autoscaling import PlanMemory, PlanSettings, plan
from cluster.learnt_speeds import KindSpeed, behind_peers, learnt_speeds, usual_step_s
from cluster.pool_state import PoolState, ReplicaState

SETTINGS = PlanSettings()


def test_an_estimate_gives_way_to_what_was_measured_beside_the_quickest_kind() -> None:
    kinds = {
        "h100": KindSpeed(1.0, True, 0.09),
        "l4": KindSpeed(0.12, True, 0.9),
        "a10g": KindSpeed(0.08, True, None),
    }
    assert learnt_speeds(kinds) == pytest.approx({"h100": 1.0, "l4": 0.1, "a10g": 0.08})


def test_a_speed_that_somebody_set_stands_and_is_what_others_are_measured_by() -> None:
    kinds = {"l4": KindSpeed(0.2, False, 1.0), "h100": KindSpeed(1.0, True, 0.1)}
    assert learnt_speeds(kinds) == pytest.approx({"l4": 0.2, "h100": 2.0})


@pytest.mark.parametrize("told", [None, math.nan, math.inf, 0.0, -1.0])
def test_what_cannot_be_a_time_teaches_nothing(told: float | None) -> None:
    kinds = {"h100": KindSpeed(1.0, True, 0.09), "l4": KindSpeed(0.12, True, told)}
    assert learnt_speeds(kinds) == {"h100": 1.0, "l4": 0.12}
    wrong = math.nan if told is None else told
    assert usual_step_s([wrong, 0.4]) == 0.4
    assert usual_step_s([wrong]) is None
    assert behind_peers(np.array([wrong]), 0.4) == [1.0]


def test_the_usual_step_is_that_of_the_quicker_ones() -> None:
    assert usual_step_s([0.5, 0.4]) == 0.4
    assert usual_step_s([0.9, 0.5, 0.5, 0.9, 0.5, 0.3]) == 0.5
    assert usual_step_s([]) is None
    assert behind_peers(np.array([0.42, 0.8, 40.0]), 0.4).tolist() == [1.0, 2.0, 10.0]


def card(name: str, **told: object) -> ReplicaState:
    fields = {"reading_age_s": 0.5, "margin_c": 30.0, "slowdown": 1.0} | told
    return ReplicaState(name, **fields)  # type: ignore[arg-type]


def pool(name: str, *replicas: ReplicaState, **told: object) -> PoolState:
    fields: dict[str, object] = {
        "stage": "denoise",
        "model": "large",
        "kind": name.upper(),
        "target": len(replicas),
        "minimum": 1,
        "maximum": 20,
        "request_s": 2.0,
        "is_estimate": True,
    }
    return PoolState(name, replicas=replicas, **(fields | told))  # type: ignore[arg-type]


def test_the_plan_reckons_with_measured_speeds_and_keeps_them_while_a_pool_is_empty() -> None:
    h100 = pool("h100", card("a", step_s=0.09))
    l4 = pool("l4", card("b", step_s=0.9), kind_speed=0.25, minimum=0)
    made, memory = plan([h100, l4], PlanMemory(), 0.0, SETTINGS)
    assert {each.pool: each.kind_speed for each in made.decisions} == pytest.approx(
        {"h100": 1.0, "l4": 0.1}
    )
    assert next(each for each in made.decisions if each.pool == "l4").capacity == pytest.approx(0.1)
    empty = pool("l4", kind_speed=0.25, minimum=0)
    made, _ = plan([h100, empty], memory, 1.0, SETTINGS)
    assert made.decisions[1].kind_speed == pytest.approx(0.1)


def test_a_replica_that_started_on_a_warm_card_counts_for_what_it_does() -> None:
    cool = [card(name, step_s=0.1) for name in "abc"]
    warm = card("warm", step_s=0.25)  # and by that it runs at its cool speed
    made, _ = plan([pool("l4", *cool, warm)], PlanMemory(), 0.0, SETTINGS)
    [decision] = made.decisions
    assert [name for name, _, _ in decision.derated] == ["warm"]
    assert decision.derated[0][1] == pytest.approx(0.4)
    assert decision.capacity == pytest.approx(3.4)
    blind, _ = plan([pool("l4", *cool, warm)], PlanMemory(), 0.0, PlanSettings(heat=False))
    assert blind.decisions[0].capacity == pytest.approx(4.0)


def test_scripted_readings_are_told_as_such() -> None:
    hot = card("a", margin_c=1.0, scripted=True)
    made, _ = plan([pool("l4", hot, card("b"))], PlanMemory(), 0.0, SETTINGS)
    assert "1 C margin (scripted readings: a rehearsal)" in made.decisions[0].reason
    made, _ = plan([pool("l4", card("a", margin_c=1.0))], PlanMemory(), 0.0, SETTINGS)
    assert "scripted" not in made.decisions[0].reason
