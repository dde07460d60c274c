"""Shapes of load: how many requests come, and when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.profiles import PROFILES, arrivals

RATES = st.floats(0.1, 50)
DURATIONS = st.floats(0.5, 60)
PROFILE = st.sampled_from(sorted(PROFILES))


@given(PROFILE, RATES, DURATIONS, st.integers())
@settings(max_examples=80, deadline=None)
def test_arrivals_rise_within_the_run_and_are_as_many_as_the_rate_says(
    name: str, rate: float, duration_s: float, seed: int
):
    times = arrivals(PROFILES[name], rate, duration_s, seed)
    assert times == sorted(times)
    assert all(0 <= at <= duration_s for at in times)
    expected = rate * duration_s
    # Six standard deviations of a Poisson count, and a little for small ones.
    assert abs(len(times) - expected) <= 6 * math.sqrt(expected) + 6
    assert times == arrivals(PROFILES[name], rate, duration_s, seed)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_piece_gets_its_share(name: str):
    profile = PROFILES[name]
    rate, duration_s = 200.0, 1000.0
    times = arrivals(profile, rate, duration_s, 7)
    begin = 0.0
    for piece in profile.pieces:
        end = begin + piece.share * duration_s
        expected = piece.share * duration_s * piece.rate * rate
        found = sum(begin <= at < end for at in times)
        assert abs(found - expected) <= 5 * math.sqrt(expected), (begin, end)
        begin = end
    assert begin == pytest.approx(duration_s)


def test_shapes_are_what_their_words_say():
    rates = {name: [each.rate for each in profile.pieces] for name, profile in PROFILES.items()}
    assert rates["step"] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert max(rates["burst"]) == pytest.approx(2.5)
    assert max(rates["diurnal"]) / min(rates["diurnal"]) == pytest.approx(5, rel=0.01)
    busiest = rates["diurnal"].index(max(rates["diurnal"]))
    assert busiest in (63, 64)  # quarter hours: 16 o'clock


def test_gaps_of_a_steady_load_are_exponential():
    times = arrivals(PROFILES["steady"], 100, 200, 3)
    gaps = sorted(after - before for before, after in zip(times, times[1:], strict=False))
    for share in (0.1, 0.5, 0.9):
        expected = -math.log(1 - share) / 100
        assert gaps[int(share * len(gaps))] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("rate", "duration_s"), [(0, 1), (1, 0), (math.nan, 1), (1, math.inf), (-1, 1)]
)
def test_what_is_no_rate_or_time_is_refused(rate: float, duration_s: float):
    with pytest.raises(ValueError, match="above 0"):
        arrivals(PROFILES["steady"], rate, duration_s, 0)
