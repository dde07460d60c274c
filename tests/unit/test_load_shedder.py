"""A front door that refuses by itself lets through what finds room, and stays out of the way."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.load_shedder import HOLDS_S, Ask, LoadShedder, Refusal

BUSY_S = 0.2
REFUSAL = Refusal(0.1, BUSY_S)


@dataclass
class Service:
    """Does one thing at a time, and takes what it will have done within a deadline."""

    deadline_s: float = 5.0
    free_at: float = 0.0
    done_s: float = 0.0
    seen: Counter[bytes] = field(default_factory=Counter)
    taken: Counter[bytes] = field(default_factory=Counter)

    def asked(self, caller: bytes, now: float) -> Refusal | None:
        self.seen[caller] += 1
        begin = max(self.free_at, now)
        if begin + BUSY_S - now > self.deadline_s:
            return Refusal(begin + BUSY_S - now - self.deadline_s, BUSY_S)
        self.free_at = begin + BUSY_S
        self.done_s += BUSY_S
        self.taken[caller] += 1
        return None


def ask(caller: str, number: int, kind: str = "") -> Ask:
    return Ask(caller.encode(), f"{caller} {kind}".encode(), f"{caller} {number}".encode())


def offer(
    shedder: LoadShedder, service: Service, arrivals: list[tuple[float, str]], kind: str = ""
) -> list[tuple[float, str, float | None]]:
    """Return of each arrival when, whose, and after how long to come again."""
    told = []
    for number, (now, caller) in enumerate(arrivals):
        asked = ask(caller, number, kind)
        said = shedder.told(asked, now)
        wait_s = None if said is None else said.wait_s
        if wait_s is None:
            refusal = service.asked(asked.caller, now)
            if refusal is None:
                shedder.accepted(asked)
            else:
                wait_s = shedder.refused(asked, refusal, now, is_first=False)
        told.append((now, caller, wait_s))
    return told


def poisson(rate: float, begin: float, end: float, caller: str = "a") -> list[tuple[float, str]]:
    draw, now = random.Random(f"{caller} {rate}"), begin
    times = []
    while (now := now + draw.expovariate(rate)) < end:
        times.append((now, caller))
    return times


@settings(max_examples=25, deadline=None)
@given(times=st.floats(2.0, 30.0))
def test_most_of_an_overload_is_refused_in_front_and_the_service_stays_busy(times: float):
    service = Service()
    told = offer(LoadShedder(), service, poisson(times / BUSY_S, 0.0, 60.0))
    assert service.free_at >= 60.0
    assert service.done_s >= 60.0, "it was never idle"
    # Of what is let through half is taken; without a door in front each one would be seen.
    assert service.seen[b"a"] <= 2.2 * 60.0 / BUSY_S + 5.0
    assert all(wait_s is None or wait_s > 0.99 for _, _, wait_s in told)


def test_nobody_is_refused_once_it_is_over():
    service, shedder = Service(), LoadShedder()
    offer(shedder, service, poisson(10 / BUSY_S, 0.0, 20.0))
    # Six seconds later: what was accepted is done, and the last refusal is long ago.
    after = offer(shedder, service, poisson(0.5 / BUSY_S, 20.0 + 6.0, 40.0))
    assert all(wait_s is None for _, _, wait_s in after)


def test_one_who_asks_seldom_is_let_through_beside_one_who_asks_always():
    service, shedder = Service(), LoadShedder()
    loud, quiet = poisson(20 / BUSY_S, 0.0, 60.0, "loud"), poisson(0.5, 0.0, 60.0, "quiet")
    offer(shedder, service, sorted([*loud, *quiet]))
    assert service.seen[b"quiet"] >= 0.9 * len(quiet)
    assert service.seen[b"loud"] <= 2.2 * 60.0 / BUSY_S


def test_what_is_asked_by_equals_alone_is_refused():
    shedder = LoadShedder()
    shedder.refused(ask("a", 0), REFUSAL, 0.0, is_first=False)
    assert shedder.told(ask("a", 1), 0.0) is None, "one is tried"
    assert shedder.told(ask("a", 2), 0.01) is not None
    assert shedder.told(ask("a", 3, "smaller"), 0.01) is None
    assert shedder.told(ask("b", 4), 0.01) is None
    assert shedder.told(ask("a", 5), HOLDS_S + 0.01) is None


def test_who_comes_when_told_is_let_through_and_if_there_is_no_room_after_all_is_first():
    shedder = LoadShedder()
    shedder.refused(ask("a", 0), REFUSAL, 0.0, is_first=False)
    assert shedder.told(ask("a", 1), 0.0) is None
    for number in range(2, 100):
        assert shedder.told(ask("a", number), 0.0) is not None
    mine, told = ask("a", 2), shedder.told(ask("a", 2), 0.0)
    now = 0.0 if told is None else told.wait_s
    assert not shedder.takes_turn(mine, now - 0.5)
    assert shedder.takes_turn(mine, now)
    assert shedder.refused(mine, REFUSAL, now, is_first=True) == 1.0
    assert shedder.takes_turn(mine, now + 1.0)
    assert not shedder.takes_turn(mine, now + 1.0), "it has come"


def test_a_service_that_has_not_done_anything_yet_is_spared_too():
    shedder = LoadShedder()
    shedder.refused(ask("a", 0), Refusal(1.0, 0.0), 0.0, is_first=False)
    told = [shedder.told(ask("a", number), number / 1000) for number in range(1, 1000)]
    assert 5 <= told.count(None) <= 15
    assert max(said.wait_s for said in told if said is not None) > 100.0


@pytest.mark.parametrize("callers", [1, 3])
def test_it_remembers_so_many_and_no_more(callers: int):
    shedder = LoadShedder()
    for number in range(10_100):
        asked = Ask(str(number % callers).encode(), str(number).encode(), b"")
        shedder.refused(asked, REFUSAL, 0.0, is_first=False)
    for number, is_known in ((0, False), (10_099, True)):
        asked = Ask(str(number % callers).encode(), str(number).encode(), b"")
        shedder.told(asked, 0.0)  # tried
        assert (shedder.told(asked, 0.0) is not None) == is_known
