"""Who comes again when told finds room, and nothing is kept from others for long or without end."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.pace import Estimate, Pace
from cluster.places import LONGEST_S, RESERVED, Places
from tests.unit.test_pace import DEADLINE_S, Service


def test_each_is_told_a_time_of_their_own_and_finds_room_then():
    places = Places()
    assert places.room(10.0, b"other", 0.0) == 10.0
    first = places.promise(b"first", 3.0, 0.4, 0.0)
    second = places.promise(b"second", 3.0, 0.4, 0.0)
    third = places.promise(b"third", 3.0, 0.4, 0.0)
    assert (first, second, third) == (3.0, 3.5, 4.0)
    assert places.room(10.0, b"other", 1.0) == pytest.approx(10.0 - 3 * 0.4)
    assert places.room(2.0, b"other", 1.0) == 2.0 * (1 - RESERVED)
    assert places.room(2.0, b"first", 1.0) == 2.0 * (1 - RESERVED), "it is too early"
    assert places.promise(b"first", 9.0, 0.4, 1.0) == 2.0, "and the time stays"
    assert places.room(10.0, b"first", 3.0) == 10.0
    # No room after all: first in line.
    assert places.promise(b"first", 1.5, 0.4, 3.0) == 1.5
    places.came(b"first")
    places.came(b"nobody")
    assert not places.is_turn(b"first", 5.0)


def test_those_who_do_not_come_are_expected_no_more():
    places = Places()
    for number in range(200):
        places.promise(str(number).encode(), 1.0, 0.8, 0.0)
    assert len(places) == 200
    assert places.promise(b"x", 1.0, 0.8, 0.0) == 201.0
    assert places.room(10.0, b"other", 1000.0) == 10.0
    assert len(places) == 0
    assert places.share_who_come < 0.1
    for number in range(200):
        places.promise(str(number).encode(), 1.0, 0.8, 1000.0)
    assert places.promise(b"y", 1.0, 0.8, 1000.0) < 30.0


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20), st.floats(0, 100), st.floats(0, 10), st.floats(0, 5), st.booleans()
        ),
        max_size=60,
    )
)
def test_a_turn_comes_when_it_was_told(calls):
    places, now = Places(), 0.0
    told: dict[bytes, float] = {}
    for number, wait_s, work_s, later_s, comes in calls:
        now += later_s
        key = str(number).encode()
        if comes and key in told and told[key] >= now:
            now = told[key]
            assert places.is_turn(key, now)
            assert places.room(7.0, key, now) == 7.0
            places.came(key)
            del told[key]
            continue
        seconds = places.promise(key, wait_s, work_s, now)
        assert 0 < seconds <= LONGEST_S
        told[key] = now + seconds


def test_it_holds_so_many_and_no_more():
    places = Places()
    for number in range(10_100):
        assert 1.0 <= places.promise(str(number).encode(), 1.0, 0.001, 0.0) < 15.0
    assert len(places) == 10_000


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_under_ten_times_too_much_those_who_come_again_find_room_and_nothing_idles(share):
    service, pace, places = Service(1, 0.2, lambda _: 1.0), Pace(), Places()
    draw, saturation = random.Random(1), 5.0
    ends: list[tuple[float, int]] = []
    accepted: list[tuple[float, Estimate]] = []
    again: list[tuple[float, bytes]] = []
    asked = found_room = 0
    arrives, number = 0.0, 0
    while arrives < 60.0:
        returns = bool(again) and again[0][0] < arrives
        now, key = heapq.heappop(again) if returns else (arrives, str(number).encode())
        if not returns:
            arrives, number = now + draw.expovariate(10 * saturation), number + 1
        while ends and ends[0][0] <= now:
            end, which = heapq.heappop(ends)
            at, estimate = accepted[which]
            pace.ended(estimate, end - at)
            if not ends:
                pace.disturbed()
        found = service.completion(now)
        estimate = pace.estimate(found, now)
        room_s = places.room(DEADLINE_S, key, now)
        late = now > 20.0  # once it is known how many come again
        asked += returns and late
        if found.behind_s and estimate.at_most_s > room_s:
            wait_s = places.promise(key, estimate.wait_s(room_s), estimate.busy_s, now)
            if not returns and draw.random() < share:
                heapq.heappush(again, (now + wait_s, key))
            continue
        found_room += returns and late
        places.came(key)
        pace.accepted(found)
        heapq.heappush(ends, (service.take(now), len(accepted)))
        accepted.append((now, estimate))
    assert asked >= 10
    assert found_room >= 0.95 * asked
    assert sum(at >= 10.0 for at, _ in accepted) >= 0.95 * saturation * 50
