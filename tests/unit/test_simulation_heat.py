"""The simulated cards: the thermal model, its fit to the recorded H100, and how cards throttle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from cluster.simulation.cards import Cards
from cluster.simulation.kinds import kind, step_costs
from cluster.simulation.thermal_fit import FITTED, read_power_step, report
from cluster.simulation.thermal_model import ThermalParameters, ThermalState
from serve.errors import ConfigurationError

PARAMETERS = ThermalParameters(25.0, 0.03, 0.8, 0.02, 15.0)


def test_what_the_fit_predicts_of_the_cooling_it_never_saw():
    found = report()
    assert found["rms_cooling_c"] <= 1.2
    assert found["targets"]["rms_cooling_c"]["met"]
    # The best constant would be 2.9 C off, and it would have to know the cooling part.
    step = read_power_step()
    assert np.std(step.temperature_c[step.heating :]) > 2.5 * found["rms_cooling_c"]


def test_the_kept_fit_is_what_the_command_finds():
    kept = json.loads(FITTED.read_text(encoding="utf-8"))
    assert kept["parameters"] == pytest.approx(report()["parameters"], rel=1e-3)


def test_a_recording_that_is_none(tmp_path):
    file = tmp_path / "step.json"
    file.write_text('{"columns": ["t_s"], "rows": [[1]]}')
    with pytest.raises(ConfigurationError):
        read_power_step(file)


@settings(max_examples=50, deadline=None)
@given(
    power=some.floats(0, 700),
    spans=some.lists(some.floats(0.01, 50), min_size=1, max_size=8),
    hindrance=some.floats(0.5, 20),
)
def test_any_division_of_time_gives_the_same_temperature(power, spans, hindrance):
    def state() -> ThermalState:
        cards = ThermalState([PARAMETERS], np.array([100.0]))
        cards.hinder(np.array([0]), hindrance)
        return cards

    divided, whole = state(), state()
    for span in spans:
        divided.advance(np.array([power]), span)
    whole.advance(np.array([power]), sum(spans))
    assert divided.temperature_c == pytest.approx(whole.temperature_c, abs=1e-6)


def test_the_update_solves_the_differential_equation():
    state = ThermalState([PARAMETERS], np.array([0.0]))
    fast = slow = 0.0
    for _ in range(20_000):  # Euler's rule with tiny steps
        fast += 1e-3 * (0.03 * 400 - fast) / 0.8
        slow += 1e-3 * (0.02 * 400 - slow) / 15.0
    state.advance(np.array([400.0]), 20.0)
    assert state.temperature_c[0] == pytest.approx(25 + fast + slow, abs=1e-2)


def test_it_settles_where_the_parameters_say():
    state = ThermalState([PARAMETERS] * 2, np.array([50.0, 50.0]))
    state.hinder(np.array([1]), 4.0)
    state.advance(np.array([300.0, 300.0]), 1e4)
    assert state.temperature_c == pytest.approx(
        [PARAMETERS.settled_c(300.0), PARAMETERS.settled_c(300.0, 4.0)]
    )


@pytest.mark.parametrize("field", [1, 2, 3, 4])
def test_parameters_that_make_no_sense(field):
    values = [25.0, 0.03, 0.8, 0.02, 15.0]
    values[field] = 0.0
    with pytest.raises(ValueError, match="above 0"):
        ThermalParameters(*values)


def _run(cards: Cards, seconds: int) -> None:
    for second in range(1, seconds + 1):
        cards.tick(float(second))


def _busy(name, number=1, hindrance=1.0) -> Cards:
    cards = Cards([kind(name)] * number, np.ones(number))
    cards.occupied[:] = True
    for card in range(number):
        cards.set_busy(card, True, 0.0)
    if hindrance != 1.0:
        cards.fail_cooling(np.arange(number), hindrance)
    return cards


@pytest.mark.parametrize("name", ["H100", "L4", "A10G"])
def test_a_cool_card_runs_at_full_clock(name):
    cards = _busy(name)
    _run(cards, 900)
    assert cards.clock[0] == 1.0
    assert not cards.throttled[0]
    assert cards.throttled_s[0] == 0
    assert cards.power_w[0] == pytest.approx(kind(name).load_w)
    assert cards.energy_j[0] == pytest.approx(900 * kind(name).load_w)


@pytest.mark.parametrize(("name", "hindrance"), [("H100", 15.0), ("L4", 5.0), ("A10G", 6.0)])
def test_without_fans_a_card_crawls_near_its_limit(name, hindrance):
    cards = _busy(name, hindrance=hindrance)
    _run(cards, 4000)
    assert cards.throttled[0]
    assert cards.reasons[0] & 0x60
    assert cards.clock[0] < 0.6
    assert abs(cards.temperature_c[0] - cards.limit_c[0]) < 4
    # It recovers once idle and cooled again.
    cards.fail_cooling(np.array([0]), 1.0)
    cards.set_busy(0, False, 4000.0)
    for second in range(4001, 4400):
        cards.tick(float(second))
    assert cards.clock[0] == 1.0
    assert cards.reasons[0] == 0


def test_less_duty_makes_less_power_and_less_heat():
    cards = _busy("H100", 2)
    cards.duty[1] = 0.5
    _run(cards, 300)
    assert cards.power_w[1] < 0.7 * cards.power_w[0]
    assert cards.temperature_c[1] < cards.temperature_c[0] - 5


def test_a_power_cap_holds():
    cards = _busy("H100")
    cards.cap_power(np.array([0]), 0.6)
    _run(cards, 60)
    assert cards.power_w[0] == pytest.approx(0.6 * kind("H100").load_w)
    assert cards.clock[0] < 1
    assert not cards.throttled[0]


def test_busy_time_within_a_tick_is_counted_exactly():
    cards = Cards([kind("L4")], np.ones(1))
    cards.occupied[:] = True
    cards.set_busy(0, True, 0.25)
    cards.set_busy(0, False, 0.5)
    cards.set_busy(0, True, 0.9)
    assert cards.tick(1.0)[0] == pytest.approx(0.35)
    assert cards.tick(2.0)[0] == pytest.approx(1.0)


def test_readings_are_whole_degrees():
    cards = _busy("L4")
    _run(cards, 30)
    assert np.all(cards.readings_c == np.round(cards.readings_c))
    assert np.all(np.abs(cards.readings_c - cards.temperature_c) <= 0.5)


def test_slower_kinds_take_the_same_curve_longer():
    from cluster.simulation.traffic import square

    h100, l4 = step_costs("H100", "large"), step_costs("L4", "large")
    ratio = l4.seconds(square(1024), 2) / h100.seconds(square(1024), 2)
    assert ratio == pytest.approx(1 / kind("L4").speed)
    with pytest.raises(ConfigurationError):
        step_costs("H100", "huge")
