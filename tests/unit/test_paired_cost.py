"""The interval of a cost: it moves with the cost, and holds it as often as it says."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.paired_cost import GROUPS, Cost, Pair, cost, lost_share, mean_added, median_added

SECONDS = st.floats(0.01, 10.0)
PAIRS = st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=100)


@given(PAIRS, st.floats(0.0, 1.0))
def test_what_is_added_to_every_pair_is_added_to_the_cost(pairs: list[Pair], added: float) -> None:
    before = cost(pairs, median_added)
    after = cost([(first, second + added) for first, second in pairs], median_added)
    assert after.mean == pytest.approx(before.mean + added, abs=1e-9)
    assert after.low == pytest.approx(before.low + added, abs=1e-9)
    assert after.high == pytest.approx(before.high + added, abs=1e-9)


@given(PAIRS)
def test_exchanged_arms_have_the_opposite_cost(pairs: list[Pair]) -> None:
    one = cost(pairs, mean_added)
    other = cost([(second, first) for first, second in pairs], mean_added)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-9)


@given(PAIRS, st.floats(0.1, 10.0))
def test_a_share_does_not_depend_on_how_fast_the_machine_is(pairs: list[Pair], pace: float) -> None:
    before = cost(pairs, lost_share)
    after = cost([(pace * first, pace * second) for first, second in pairs], lost_share)
    assert (after.low, after.high) == pytest.approx((before.low, before.high), abs=1e-9)


@given(PAIRS)
def test_every_pair_is_in_one_group(pairs: list[Pair]) -> None:
    groups: list[list[Pair]] = []

    def kept(group: object) -> float:
        groups.append(list(group))  # type: ignore[call-overload]
        return 0.0

    found = cost(pairs, kept)
    assert [pair for group in groups for pair in group] == pairs
    assert found.groups == len(groups) == min(GROUPS, len(pairs))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_a_share_of_throughput_is_that_of_the_time() -> None:
    assert lost_share([(1.0, 1.25)]) == pytest.approx(0.2)


def _disturbed(chance: random.Random, added: float, pairs: int = 200) -> list[Pair]:
    """Pairs on a machine that goes slower and faster for some pairs in a row, with long tails."""
    found, drift = [], 0.0
    for _ in range(pairs):
        drift = 0.7 * drift + chance.gauss(0, 0.005)
        tail = chance.expovariate(200)
        found.append((0.1 + tail, 0.1 + chance.expovariate(200) + drift + added))
    return found


def test_the_interval_holds_the_cost_where_disturbances_outlast_a_pair() -> None:
    chance = random.Random(1)
    held = 0
    for _ in range(400):
        found = cost(_disturbed(chance, 0.002), mean_added)
        held += found.low <= 0.002 <= found.high
    # What is written on it is 95 %; groups of ten pairs are not quite independent here.
    assert held >= 0.85 * 400


def test_pairs_taken_for_independent_would_promise_too_much() -> None:
    """Why there are groups: of the same pairs, each by itself, the interval misses often."""
    chance = random.Random(1)
    held = 0
    for _ in range(100):
        pairs = _disturbed(chance, 0.002, GROUPS)  # one a group
        found = cost(pairs, mean_added)
        held += found.low <= 0.002 <= found.high
    assert held < 0.8 * 100


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-1.0, 0.5, "met"), (-1.0, 1.0, "met"), (0.9, 1.1, "undecided"), (1.1, 2.0, "missed")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Cost((low + high) / 2, low, high, 20).verdict(1.0) == verdict


def test_one_pair_says_nothing() -> None:
    with pytest.raises(ValueError, match="1 pairs"):
        cost([(1.0, 2.0)], median_added)
