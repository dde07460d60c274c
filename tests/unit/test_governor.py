"""The governor on cards of many kinds, each a model of two first-order responses to power."""

import itertools
import math
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.governor import FREE, Governor, GovernorSettings

STEP_S = 0.1
READ_EVERY = 5


class Card:
    """Temperature above ambient: a fast and a slow part of what full power does."""

    def __init__(self, fast_c: float, fast_s: float, slow_c: float, slow_s: float) -> None:
        self.parts = [[fast_c, fast_s, 0.0], [slow_c, slow_s, 0.0]]

    def run(self, duty: float) -> float:
        for part in self.parts:
            rise, seconds, now = part
            part[2] += (rise * duty - now) * (1 - math.exp(-STEP_S / seconds))
        return 34 + sum(part[2] for part in self.parts)


def governed(card: Card, target_c: float, seconds: float = 240) -> tuple[list[float], list[float]]:
    governor = Governor(GovernorSettings(target_c=target_c))
    duty, temperatures, duties = 1.0, [34.0], [1.0]
    for number in range(int(seconds / STEP_S)):
        temperatures.append(card.run(duty))
        if number % READ_EVERY == 0:
            # Whole degrees and 0.2 s late, as NVML tells them.
            seen = float(int(temperatures[max(0, len(temperatures) - 3)]))
            duty = governor.observe(number * STEP_S, seen, None, False).duty
        duties.append(duty)
    return temperatures, duties


def ten_second_means(values: list[float]) -> list[float]:
    return [fmean(values[at : at + 100]) for at in range(0, len(values) - 100, 50)]


@given(
    st.floats(4, 40),
    st.floats(0.7, 4),
    st.floats(4, 50),
    st.floats(15, 90),
    st.floats(0.35, 0.95),
)
@settings(max_examples=60, deadline=None)
def test_a_card_settles_at_its_target_without_swinging(
    fast_c: float, fast_s: float, slow_c: float, slow_s: float, share: float
) -> None:
    target = 34 + share * (fast_c + slow_c)
    temperatures, duties = governed(Card(fast_c, fast_s, slow_c, slow_s), target, 400)
    settled = ten_second_means(temperatures)[-20:]
    assert all(abs(mean - target) <= 2 for mean in settled)
    # The plant is linear: its equilibrium share is known, and whole degrees blur it a little.
    blur = 0.12 + 1.5 / (fast_c + slow_c)
    assert abs(fmean(duties[-1000:]) - share) <= blur


def test_as_the_h100_was_recorded_ten_seconds_after_its_start_it_is_at_the_target() -> None:
    temperatures, _ = governed(Card(18, 1, 9, 20), 50)
    assert max(ten_second_means(temperatures)[2:]) <= 52
    assert max(temperatures) <= 54


def test_the_ripple_of_forwards_and_pauses_does_not_shake_the_share() -> None:
    # A die's own response, as seen on an H100: 12 C within a fifth of a second.
    governor = Governor(GovernorSettings(target_c=50))
    die, card = Card(12, 0.2, 0.0001, 1), Card(6, 2, 9, 20)
    allowance, duties, forward_s = FREE, [], 0.2
    computing, left = 1.0, forward_s
    for number in range(3000):
        temperature = die.run(computing) + card.run(computing) - 34
        left -= STEP_S
        if left <= 0:
            computing = 1.0 - computing if allowance.duty < 1 else 1.0
            left = forward_s if computing else allowance.pause_s(forward_s)
        if number % READ_EVERY == 0:
            allowance = governor.observe(number * STEP_S, round(temperature), None, False)
            duties.append(allowance.duty)
    settled = duties[len(duties) // 2 :]
    assert max(settled) - min(settled) <= 0.15


def test_a_card_that_stays_cool_is_never_held_back() -> None:
    _, duties = governed(Card(18, 1, 9, 20), 80)
    assert set(duties) == {1.0}


def test_full_speed_returns_once_the_card_has_room() -> None:
    governor = Governor(GovernorSettings(target_c=50))
    for second in range(60):
        held = governor.observe(second, 70, None, False)
    assert held.duty == pytest.approx(0.1)
    assert not governor.at_rest
    back = next(s for s in itertools.count() if governor.observe(60 + s, 40, None, False).duty == 1)
    assert back <= 10
    for second in range(100, 160):
        governor.observe(second, 40, None, False)
    assert governor.at_rest


def test_throttling_cuts_at_once_and_the_share_comes_back_slowly() -> None:
    governor = Governor(GovernorSettings())
    assert governor.observe(0, 60, 87, False).duty == 1
    governor.observe(0.5, 60, 87, True)
    cut = governor.observe(1, 60, 87, True)
    assert cut.duty < 0.9
    assert "slows itself down" in cut.reason
    assert governor.observe(2, 60, 87, True).duty < cut.duty
    after = [governor.observe(3 + second, 60, 87, False).duty for second in range(120)]
    assert after == sorted(after)
    assert after[1] < 0.75
    assert after[-1] == 1


def test_with_room_to_spare_one_reading_of_throttling_is_not_believed() -> None:
    governor = Governor(GovernorSettings())
    duties = [governor.observe(at / 2, 60, 87, at % 10 == 0).duty for at in range(200)]
    assert set(duties) == {1.0}


def test_near_its_limit_the_first_reading_of_throttling_cuts() -> None:
    governor = Governor(GovernorSettings(below_limit_c=1))
    assert governor.observe(0, 80, 87, True).duty < 0.9


def test_what_a_card_was_cut_to_is_forgotten_while_it_idles() -> None:
    governor = Governor(GovernorSettings())
    for second in range(20):
        governor.observe(second, 84, 87, True)
    assert governor.allowance.duty < 0.4
    assert governor.observe(3600, 40, 87, False).duty == 1


def test_a_card_that_throttles_already_is_not_paused_to_a_crawl() -> None:
    governor = Governor(GovernorSettings())
    for second in range(60):
        held = governor.observe(second, 90, 87, True)
    assert held.duty == pytest.approx(0.3)
    assert held.reason == "the card slows itself down for heat"
    # Over its target and at full clock the pauses are what holds it.
    for second in range(60, 90):
        held = governor.observe(second, 86, 87, False)
    assert held.duty == pytest.approx(0.1)


def test_the_limit_that_the_card_states_counts_unless_a_target_is_set() -> None:
    own = Governor(GovernorSettings(below_limit_c=5))
    assert own.observe(0, 70, 87, False).duty == 1
    for second in range(1, 5):
        own.observe(second, 84, 87, False)
    assert own.allowance.duty < 1
    assert "82" in own.allowance.reason
    assert Governor(GovernorSettings(target_c=60)).observe(0, 70, 87, False).duty < 1


def test_off_means_off() -> None:
    governor = Governor(GovernorSettings(enabled=False, target_c=20))
    assert governor.observe(0, 99, 87, True).duty == 1


def test_below_a_certain_share_rows_are_trimmed_but_never_below_one_guided_picture() -> None:
    governor = Governor(GovernorSettings(target_c=50))
    assert governor.observe(0, 40, None, False).most_rows is None
    rows = [governor.observe(second, 75, None, False).most_rows for second in range(1, 60)]
    assert rows[-1] is not None
    assert rows[-1] >= 2
    assert min(each for each in rows if each is not None) >= 2


def test_an_idle_card_is_not_held_back_further_for_a_warm_room() -> None:
    governor = Governor(GovernorSettings(target_c=50))
    governor.observe(0, 52, None, False, busy=False)
    first = governor.allowance.duty
    for second in range(1, 600):
        governor.observe(second, 52, None, False, busy=False)
    assert governor.allowance.duty == pytest.approx(first)


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True),
            st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
            st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_whatever_a_card_says_an_allowance_comes_back(
    readings: list[tuple[float, float | None, float | None, bool]],
) -> None:
    governor = Governor(GovernorSettings())
    for at, temperature, limit, throttled in readings:
        allowance = governor.observe(at, temperature, limit, throttled)
        assert 0.1 <= allowance.duty <= 1
        assert allowance.pause_s(0.1) >= 0


@given(st.floats(40, 100), st.floats(0, 30))
def test_a_warmer_card_never_gets_more(temperature: float, more: float) -> None:
    cooler, warmer = (Governor(GovernorSettings(target_c=70)) for _ in range(2))
    for second in range(20):
        low = cooler.observe(second, temperature, None, False)
        high = warmer.observe(second, temperature + more, None, False)
        assert high.duty <= low.duty + 1e-9


def test_free_says_so() -> None:
    assert FREE.pause_s(1) == 0
    with pytest.raises(ValueError, match="least_duty"):
        GovernorSettings(least_duty=0)
