"""Who comes again when told finds room, and nothing is kept from others for long or without end."""

from __future__ import annotations

import heapq
import itertools
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


def test_each_second_is_promised_once_however_long_a_request_takes():
    places = Places()
    told = [places.promise(str(number).encode(), 3.0, 2.5, 0.0) for number in range(20)]
    between = [later - sooner for sooner, later in itertools.pairwise(told)]
    assert all(2.5 <= seconds <= 5.0 for seconds in between)
    for number in range(20):
        places.came(str(number).encode())
    assert places.promise(b"x", 3.0, 2.5, 0.0) == 3.0, "nothing is left of them"


def test_who_asks_for_little_does_not_stand_behind_all_that_another_asks_for():
    places = Places()
    flood = [places.promise(b"a%d" % number, 1.0, 0.2, 0.0, whose=b"a") for number in range(400)]
    assert max(flood) > 90.0
    mine = [places.promise(b"b%d" % number, 1.0, 0.2, 0.0, whose=b"b") for number in range(4)]
    assert mine[0] <= 1.5
    assert mine == sorted(mine)
    assert mine[-1] <= 3.0, "as long as if both had asked for as much"
    assert places.promise(b"x", 1.0, 0.2, 0.0, whose=b"a") >= max(flood)


def test_many_who_ask_for_one_each_are_told_as_many_times():
    places = Places()
    told = [
        places.promise(b"%d" % number, 1.0, 0.2, 0.0, whose=b"%d" % number) for number in range(400)
    ]
    assert max(told) > 90.0


def test_who_did_not_come_is_forgotten_though_others_before_them_are_expected_yet():
    places = Places()
    places.promise(b"long", 200.0, 0.2, 0.0, whose=b"a")
    for second in range(100):
        told = places.promise(b"%d" % second, 1.0, 0.2, float(second), whose=b"b")
        assert told < 5.0, "none of those who did not come stands in the way"
    assert len(places) < 12
    assert places.share_who_come < 0.3
    assert places.is_turn(b"long", 200.0)


def test_it_holds_so_many_and_no_more_and_one_alone_leaves_half_of_them_free():
    places = Places()
    for number in range(10_100):
        assert 1.0 <= places.promise(b"a%d" % number, 1.0, 0.001, 0.0, whose=b"a") < 15.0
    assert len(places) == 5_000
    for number in range(10_100):
        places.promise(b"%d" % number, 1.0, 0.001, 0.0, whose=b"%d" % number)
    assert len(places) == 10_000
    assert len(places._taken) == 5_001, "of those who have none nothing is kept"


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
