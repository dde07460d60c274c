"""When a request would be done: by hand, and what holds for any stages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.completion import PoolOutlook, StageOutlook, completion, done_at

ONE = (PoolOutlook(2.0, 1.0),)
pools = st.lists(
    st.builds(PoolOutlook, st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=4
).map(tuple)
stages = st.lists(
    st.builds(StageOutlook, pools, st.floats(0.001, 10), st.integers(1, 16), st.floats(0, 1000)),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize(
    ("pools", "ahead_s", "expected"),
    [
        (ONE, 0.0, 2.0),
        (ONE, 6.0, 8.0),
        ((PoolOutlook(2.0, 3.0),), 6.0, 4.0),
        # A second pool is used from where it is as quick as waiting for the first.
        ((PoolOutlook(2.0, 1.0), PoolOutlook(10.0, 1.0)), 6.0, 8.0),
        ((PoolOutlook(2.0, 1.0), PoolOutlook(10.0, 1.0)), 8.0, 10.0),
        ((PoolOutlook(10.0, 1.0), PoolOutlook(2.0, 1.0)), 12.0, 12.0),
        ((PoolOutlook(1.0, 0.0), PoolOutlook(2.0, 1.0)), 0.0, 2.0),
        ((PoolOutlook(1.0, 0.0),), 0.0, math.inf),
    ],
)
def test_done_where_it_is_done_first(pools, ahead_s, expected):
    assert done_at(pools, ahead_s) == pytest.approx(expected)


def test_stages_wait_side_by_side_and_work_one_after_the_other():
    text = StageOutlook((PoolOutlook(0.1, 1.0),), 0.1, 1, 0.5)
    denoise = StageOutlook((PoolOutlook(4.0, 2.0),), 4.0, 3, 40.0)
    decode = StageOutlook((PoolOutlook(0.3, 1.0),), 0.3, 3, 3.0)
    found = completion([text, denoise, decode])
    # Two more pictures of 4 s on two cards, and of 0.3 s on one.
    assert found.alone_s == pytest.approx(0.1 + (4 + 4) + (0.3 + 0.6))
    assert found.behind_s == pytest.approx(20.0)
    assert found.own_s == pytest.approx(6.0)
    assert found.least_s == pytest.approx(0.1 + (4 + 4 / 3) + (0.3 + 0.2))


@given(pools, st.floats(0, 1000), st.floats(0, 1000))
def test_work_ahead_is_done_by_all_pools_and_nobody_gains_from_it(some, less, more):
    at = done_at(some, less)
    assert at >= min(pool.own_s for pool in some)
    assert done_at(some, less + more) >= at - 1e-9
    level = sum(pool.capacity * max(0.0, at - pool.own_s) for pool in some)
    assert level == pytest.approx(less, rel=1e-6, abs=1e-6)


@given(stages, st.integers(0, 2), st.floats(0, 1000))
def test_more_ahead_or_more_pictures_are_never_done_earlier(some, at, more):
    found = completion(some)
    assert 0 <= found.least_s <= found.alone_s + 1e-9
    at %= len(some)
    busier = [*some]
    busier[at] = replace(some[at], ahead_s=some[at].ahead_s + more)
    assert completion(busier).alone_s == found.alone_s
    assert completion(busier).behind_s >= found.behind_s - 1e-9
    larger = [*some]
    larger[at] = replace(some[at], pieces=some[at].pieces + 1)
    bigger = completion(larger)
    assert bigger.alone_s >= found.alone_s
    assert bigger.alone_s + bigger.behind_s >= found.alone_s + found.behind_s - 1e-6


@given(stages)
def test_who_comes_next_is_later_by_at_most_what_was_said(some):
    found = completion(some)
    after = completion(
        [replace(stage, ahead_s=stage.ahead_s + stage.pieces * stage.piece_s) for stage in some]
    )
    slowest = max(
        stage.pieces * stage.piece_s / min(pool.capacity for pool in stage.pools) for stage in some
    )
    assert found.behind_s - 1e-9 <= after.behind_s <= found.behind_s + slowest + 1e-6
