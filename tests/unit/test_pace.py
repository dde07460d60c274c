"""Admission by forecast on a simulated service that tells less than the truth about itself."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.completion import Completion, PoolOutlook, StageOutlook, completion
from cluster.pace import Estimate, Pace

DEADLINE_S = 5.0


@dataclass
class Service:
    """Some servers, first come, first served; a second of told work takes `slower` seconds."""

    servers: int
    work_s: float
    slower: Callable[[float], float]
    latency_s: float = 0.0
    free_at: list[float] = field(default_factory=list)
    jobs: list[tuple[float, float]] = field(default_factory=list)  # begin and end of each

    def __post_init__(self) -> None:
        self.free_at = [0.0] * self.servers

    def completion(self, now: float) -> Completion:
        self.jobs = [each for each in self.jobs if each[1] > now]
        ahead = sum(self.work_s * min((end - now) / (end - begin), 1.0) for begin, end in self.jobs)
        pool = PoolOutlook(self.work_s, float(self.servers))
        return completion([StageOutlook((pool,), self.work_s, 1, ahead)])

    def take(self, now: float) -> float:
        begin = max(heapq.heappop(self.free_at), now)
        end = begin + self.work_s * self.slower(begin)
        heapq.heappush(self.free_at, end)
        self.jobs.append((begin, end))
        return end + self.latency_s


@dataclass
class Outcome:
    at: float
    took_s: float
    estimate: Estimate


def run(service: Service, rates: list[tuple[float, float]], seed: int = 0) -> list[Outcome]:
    """Offer requests with a deadline, at a rate until a time, and another one until another."""
    draw = random.Random(seed)
    pace = Pace()
    taken: list[Outcome] = []
    ends: list[tuple[float, int]] = []
    now = 0.0
    for until, rate in rates:
        while (now := now + draw.expovariate(rate)) < until:
            while ends and ends[0][0] <= now:
                _, which = heapq.heappop(ends)
                ended = taken[which]
                pace.ended(ended.estimate, ended.took_s)
                if not ends:
                    pace.disturbed()
            found = service.completion(now)
            estimate = pace.estimate(found, now)
            if found.behind_s and estimate.at_most_s > DEADLINE_S:
                continue
            end = service.take(now)
            pace.accepted(found)
            heapq.heappush(ends, (end, len(taken)))
            taken.append(Outcome(now, end - now, estimate))
    return taken


def share_in_time(taken: list[Outcome]) -> float:
    return sum(each.took_s <= DEADLINE_S for each in taken) / len(taken)


def made_a_second(taken: list[Outcome], begin: float, end: float) -> float:
    return sum(begin <= each.at < end for each in taken) / (end - begin)


@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("slower", [0.5, 1.0, 4.0])
def test_ten_times_too_much_is_kept_to_what_can_be_done(servers, slower):
    saturation = servers / (0.4 * slower)
    service = Service(servers, 0.4, lambda _: slower)
    taken = run(service, [(10.0, 0.5 * saturation), (40.0, 10 * saturation)])
    assert share_in_time(taken) >= 0.95
    # Nor is anything given away: the servers are busy all the time.
    assert made_a_second(taken, 20.0, 40.0) >= 0.95 * saturation


@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_a_service_that_refusals_slow_down_is_seen_through_at_once(slower):
    """Half as fast from the first second of the overload on."""
    saturation = 1 / (0.2 * slower)
    service = Service(1, 0.2, lambda at: slower * (2.0 if 20.0 <= at < 80.0 else 1.0))
    phases = [(20.0, 0.5 * saturation), (80.0, 10 * saturation), (110.0, 0.5 * saturation)]
    taken = run(service, phases)
    late = [each for each in taken if each.took_s > DEADLINE_S]
    assert len(late) <= 0.05 * len([each for each in taken if 20 <= each.at < 80])
    assert made_a_second(taken, 30.0, 80.0) >= 0.95 * saturation / 2
    after = [each for each in taken if each.at >= 80 + DEADLINE_S]
    assert len(after) >= 0.4 * saturation * 25  # nobody is refused any more


def test_work_that_is_cancelled_is_not_taken_for_done():
    pace = Pace()
    pace.estimate(Completion(0.1, 0.1, 20.0, 0.1), 0.0)
    pace.dropped(18.0)
    pace.estimate(Completion(0.1, 0.1, 1.0, 0.1), 1.0)
    assert pace.queue == pytest.approx(1.0)


def test_a_bad_moment_is_forgotten_by_what_ends_though_the_queue_stays_short():
    pace = Pace()
    pace.estimate(Completion(0.1, 0.1, 2.0, 0.1), 0.0)
    pace.estimate(Completion(0.1, 0.1, 2.0, 0.1), 3.0)
    assert pace.queue > 3
    for number in range(40):
        short = pace.estimate(Completion(0.1, 0.1, 0.2, 0.1), 10.0 + number)
        pace.ended(short, 0.3)
    pace.estimate(Completion(0.1, 0.1, 0.2, 0.1), 60.0)
    assert pace.queue < 1.5


def test_a_pause_in_the_queue_is_not_taken_for_slowness():
    pace = Pace()
    busy, idle = Completion(0.1, 0.1, 2.0, 0.1), Completion(0.1, 0.1, 0.0, 0.1)
    pace.estimate(busy, 0.0)
    pace.estimate(Completion(0.1, 0.1, 1.0, 0.1), 1.0)
    assert pace.queue == pytest.approx(1.0)
    pace.ended(pace.estimate(idle, 5.0), 0.1)
    pace.disturbed()
    pace.estimate(busy, 60.0)
    pace.estimate(Completion(0.1, 0.1, 1.0, 0.1), 61.0)
    assert pace.queue == pytest.approx(1.0)


@settings(max_examples=25)
@given(
    servers=st.integers(1, 4),
    work_s=st.floats(0.2, 0.8),
    slower=st.floats(0.3, 4.0),
    latency_s=st.floats(0.0, 0.5),
    times=st.floats(0.3, 5.0),
    seed=st.integers(0, 1000),
)
def test_whatever_the_service_is_what_it_takes_is_done_in_time(
    servers, work_s, slower, latency_s, times, seed
):
    if work_s * slower + latency_s > 0.6 * DEADLINE_S:
        return
    saturation = servers / (work_s * slower)
    service = Service(servers, work_s, lambda _: slower, latency_s)
    taken = run(service, [(10.0, 0.5 * saturation), (40.0, times * saturation)], seed)
    assert share_in_time(taken) >= 0.95
    assert made_a_second(taken, 20.0, 40.0) >= 0.7 * min(times, 1.0) * saturation - 1.0
