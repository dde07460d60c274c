"""The plan in a closed loop: a queue under Poisson arrivals, replicas that take time to start."""

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling import PlanMemory, PlanSettings, plan
from cluster.pool_state import PoolState, ReplicaState

REQUEST_S = 2.0
START_S = 40.0
REMEMBERED_S = 900
SETTINGS = PlanSettings(after_surprise_s=REMEMBERED_S)


class Loop:
    """A pool whose replicas share a queue of work evenly, in steps of a second."""

    def __init__(self, replicas: int, maximum: int = 200, margin_c: float = 30.0) -> None:
        self.now = 0.0
        self.speed = 1.0
        self.margin_c = margin_c
        self.work = 0.0
        self.accepted = [0.0] * replicas
        self.starting: list[float] = []
        self.memory = PlanMemory()
        self.maximum = maximum
        self.counts: list[int] = []
        self.waits: list[float] = []

    def step(self, work: float, plan_settings: PlanSettings) -> None:
        self.now += 1
        self.accepted += [0.0 for at in self.starting if at <= self.now]
        self.starting = [at for at in self.starting if at > self.now]
        ready = len(self.accepted)
        self.accepted = [each + work / ready for each in self.accepted]
        self.work = max(self.work + work - ready * self.speed, 0.0)
        share = self.work / ready
        replicas = tuple(
            ReplicaState(
                id=f"{number}",
                waiting_s=share,
                requests=math.ceil(share / REQUEST_S),
                accepted_s=accepted,
                slowdown=1 / self.speed,
                margin_c=self.margin_c,
                reading_age_s=0.5,
            )
            for number, accepted in enumerate(self.accepted)
        )
        state = PoolState(
            name="pool",
            stage="denoise",
            model="large",
            kind="H100",
            replicas=replicas,
            target=ready + len(self.starting),
            minimum=1,
            maximum=self.maximum,
            request_s=REQUEST_S,
            start_s=START_S,
        )
        made, self.memory = plan([state], self.memory, self.now, plan_settings)
        wanted = made.replicas["pool"]
        self.starting += [self.now + START_S] * (wanted - state.target)
        if wanted < state.target:
            gone = state.target - wanted
            self.starting = self.starting[: max(len(self.starting) - gone, 0)]
            self.accepted = self.accepted[: wanted - len(self.starting)]
        self.counts.append(wanted)
        self.waits.append(self.work / max(ready * self.speed, 1e-9))

    def run(self, rate: float, seconds: int, random: Random | None = None) -> None:
        """Let work come; with `random` as Poisson arrivals of requests, without it evenly."""
        for _ in range(seconds):
            came = rate if random is None else REQUEST_S * _poisson(random, rate / REQUEST_S)
            self.step(came, SETTINGS)


def _poisson(random: Random, mean: float) -> int:
    count, left = 0, mean - random.expovariate(1.0)
    while left > 0:
        count += 1
        left -= random.expovariate(1.0)
    return count


def turns(counts: list[int]) -> int:
    """How often the count changed its direction."""
    steps = [after - before for before, after in zip(counts, counts[1:], strict=False)]
    moves = [step for step in steps if step]
    return sum((one > 0) != (other > 0) for one, other in zip(moves, moves[1:], strict=False))


@given(st.floats(0.2, 60), st.integers(1, 60), st.floats(3, 40))
@settings(max_examples=8, deadline=None)
def test_constant_load_settles_and_stays(rate: float, begun: int, margin_c: float) -> None:
    loop = Loop(begun, margin_c=margin_c)
    loop.run(rate, 1400)
    assert len(set(loop.counts[-200:])) == 1
    assert turns(loop.counts) <= 2
    assert loop.waits[-1] < 1
    if margin_c >= 30:
        assert rate <= loop.counts[-1] <= rate / 0.7 + math.sqrt(rate) + 2


@pytest.mark.parametrize("rate", [1.5, 20.0])
def test_noise_does_not_make_it_flap(rate: float) -> None:
    loop = Loop(round(rate / 0.7) + 1)
    loop.run(rate, 1800, Random(7))
    later = loop.counts[600:]
    assert turns(later) <= 6  # in twenty minutes
    assert max(later) - min(later) <= max(2, 0.2 * max(later))
    assert sorted(loop.waits)[round(0.95 * len(loop.waits))] < 4


def test_a_burst_is_cleared_and_its_replicas_go_again() -> None:
    loop = Loop(8)
    random = Random(3)
    loop.run(5.0, 600, random)
    before = loop.counts[-1]
    loop.run(25.0, 300, random)
    assert max(loop.waits[-60:]) < 10
    assert 30 <= max(loop.counts) <= 110
    loop.run(5.0, 600, random)
    assert 25 <= loop.counts[-1] < max(loop.counts)  # for as much again, not for its backlog
    loop.run(5.0, REMEMBERED_S, random)
    assert loop.counts[-1] <= before + 1


def test_a_hall_that_slows_down_gets_replicas_and_gives_them_back() -> None:
    loop = Loop(16)
    loop.run(10.0, 600)
    cool = loop.counts[-1]
    loop.speed, loop.margin_c = 0.6, 3.0
    loop.run(10.0, 600)
    hot = loop.counts[-1]
    assert hot >= cool / 0.65
    assert loop.waits[-1] < 1
    loop.speed, loop.margin_c = 1.0, 30.0
    loop.run(10.0, 900)
    assert loop.counts[-1] == cool


def test_replicas_that_die_are_no_surge_of_work() -> None:
    loop = Loop(16)
    loop.run(10.0, 600)
    loop.accepted = loop.accepted[4:]
    loop.starting += [loop.now + START_S] * 4
    loop.run(10.0, 300)
    assert max(loop.counts[-300:]) <= 16 + 8


def test_how_often_replicas_report_does_not_matter() -> None:
    """Demand read every second and every twenty seconds is the same."""

    def demand(every: int) -> float:
        memory, told, told_at = PlanMemory(), 0.0, 0
        for second in range(300):
            if second % every == 0:
                told, told_at = 3.0 * second, second
            replica = ReplicaState(id="a", accepted_s=told, age_s=float(second - told_at))
            state = PoolState("pool", "denoise", "large", "CPU", (replica,), 1, 1, 9)
            made, memory = plan([state], memory, float(second), replace(PlanSettings()))
        return made.decisions[0].demand

    assert demand(1) == pytest.approx(3.0, rel=0.05)
    assert demand(20) == pytest.approx(3.0, rel=0.35)


def burst(loop: Loop, rate: float) -> None:
    loop.run(rate, 120)
    loop.run(2.0, 400)


def test_replicas_stay_for_bursts_that_come_again_and_go_once_they_do_not() -> None:
    loop = Loop(3)
    loop.run(2.0, 200)
    usual = loop.counts[-1]
    burst(loop, 14.0)
    first = max(loop.counts)
    assert loop.counts[-1] > 2 * usual
    # The second finds its replicas, and is no surprise; so does the third, long after the first.
    loop.run(2.0, REMEMBERED_S - 900)
    for _ in range(2):
        burst(loop, 14.0)
        assert max(loop.waits[-500:]) < 5.0
    assert max(loop.counts) <= first + 2
    loop.run(2.0, REMEMBERED_S + 400)
    assert loop.counts[-1] <= usual + 1


def test_a_long_burst_is_remembered_from_its_end() -> None:
    loop = Loop(3)
    loop.run(2.0, 200)
    usual = loop.counts[-1]
    # Once replicas have come nothing waits any more, but the burst goes on.
    loop.run(14.0, REMEMBERED_S - 400)
    loop.run(2.0, 700)
    assert loop.counts[-1] > 2 * usual
    loop.run(2.0, REMEMBERED_S)
    assert loop.counts[-1] <= usual + 1


def test_load_that_stays_lower_than_a_burst_does_not_keep_its_replicas() -> None:
    loop = Loop(3)
    loop.run(2.0, 200)
    loop.run(14.0, 200)
    most = max(loop.counts)
    loop.run(11.5, REMEMBERED_S + 900)
    assert loop.counts[-1] < 0.95 * most
