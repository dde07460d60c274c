"""A card's readings by NVML: right where it answers, told where it does not, never an exception."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.thermal import NvmlCard, Reading, ScriptedHeat, open_source
from serve.config import ThermalSettings
from tests.unit.fake_nvml import (
    A10G,
    FIELD,
    FUNCTION_NOT_FOUND,
    H100,
    NOT_SUPPORTED,
    SLICE,
    THRESHOLD,
    UNKNOWN,
    UUID,
    V100,
    Clock,
    FakeNvml,
    NVMLError,
)

_FIGURES = (
    "temperature_c",
    "memory_temperature_c",
    "margin_c",
    "power_w",
    "power_cap_w",
    "energy_j",
    "sm_clock_mhz",
    "clocks_event_reasons",
)


def read(answers: dict[Any, Any], **changes: Any) -> Reading:
    reading = NvmlCard(UUID, nvml=FakeNvml(answers | changes)).read()
    assert reading is not None
    return reading


def test_a_hopper_card_tells_everything_in_our_units() -> None:
    clock = Clock()
    reading = NvmlCard(UUID, nvml=FakeNvml(H100), clock=clock).read()
    assert reading == Reading(
        at=clock.now,
        temperature_c=61.0,
        memory_temperature_c=71.0,
        margin_c=24.0,
        power_w=pytest.approx(697.1),  # type: ignore[arg-type]
        power_cap_w=pytest.approx(700.0),  # type: ignore[arg-type]
        energy_j=pytest.approx(123_456.789),  # type: ignore[arg-type]
        sm_clock_mhz=1365.0,
        clocks_event_reasons=0x4,
        source="nvml",
        problems=(),
    )
    assert reading.limit_c == 85.0
    assert not reading.is_throttling


@pytest.mark.parametrize("reasons", [0x08, 0x20, 0x40, 0x80, 0x20 | 0x4])
def test_heat_and_power_brakes_are_throttling(reasons: int) -> None:
    assert read({**H100, "nvmlDeviceGetCurrentClocksEventReasons": reasons}).is_throttling


@pytest.mark.parametrize("reasons", [0, 0x1, 0x2, 0x4, 0x10, 0x100])
def test_idling_and_the_power_cap_are_not_throttling(reasons: int) -> None:
    assert not read({**H100, "nvmlDeviceGetCurrentClocksEventReasons": reasons}).is_throttling


@pytest.mark.parametrize(
    ("answers", "margin"),
    [
        (H100, 24.0),
        # The margin at which slowing begins is not always 0.
        ({**H100, (FIELD, 196): 3}, 21.0),
        ({**H100, (FIELD, 196): -2, (FIELD, 195): NVMLError(NOT_SUPPORTED)}, 26.0),
        ({**H100, "nvmlDeviceGetMarginTemperature": -3}, -3.0),
        # Drivers before the margin: thresholds, and here the memory is nearer (95 - 71 against 26).
        ({**H100, "nvmlDeviceGetMarginTemperature": NVMLError(FUNCTION_NOT_FOUND)}, 24.0),
        (A10G, 17.0),
        (V100, 10.0),
        ({**V100, (FIELD, 82): 40}, 23.0),
        # Some cards tell a maximum above the slowdown.
        ({**A10G, (THRESHOLD, 3): 105}, 24.0),
        ({**A10G, (THRESHOLD, 1): NVMLError(NOT_SUPPORTED)}, 17.0),
    ],
)
def test_the_margin_is_to_the_first_limit(answers: dict[Any, Any], margin: float) -> None:
    reading = read(answers)
    assert reading.margin_c == margin
    assert reading.temperature_c is not None
    assert reading.limit_c == reading.temperature_c + margin
    assert not any("margin" in problem for problem in reading.problems)


def test_thresholds_do_not_stand_in_for_a_margin_that_failed_once() -> None:
    nvml = FakeNvml({**H100, "nvmlDeviceGetMarginTemperature": NVMLError(UNKNOWN)})
    card = NvmlCard(UUID, nvml=nvml)
    first = card.read()
    nvml.answers["nvmlDeviceGetMarginTemperature"] = 24
    second = card.read()
    assert first is not None
    assert second is not None
    assert first.margin_c is None
    assert first.problems == ("margin: NVML says 999",)
    assert second.margin_c == 24.0


def test_older_names_serve_where_the_new_ones_are_missing() -> None:
    answers = {
        **H100,
        ("nvmlDeviceGetTemperatureV", 0): NVMLError(FUNCTION_NOT_FOUND),
        ("nvmlDeviceGetTemperature", 0): 62,
        "nvmlDeviceGetEnforcedPowerLimit": NVMLError(NOT_SUPPORTED),
        "nvmlDeviceGetPowerManagementLimit": 650_000,
        "nvmlDeviceGetCurrentClocksEventReasons": NVMLError(FUNCTION_NOT_FOUND),
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40,
    }
    reading = read(answers)
    assert (reading.temperature_c, reading.power_cap_w) == (62.0, 650.0)
    assert reading.clocks_event_reasons == 0x40
    assert reading.problems == ()


@pytest.mark.parametrize("name", [key for key in H100 if key != "nvmlDeviceGetMigMode"])
@pytest.mark.parametrize("code", [NOT_SUPPORTED, UNKNOWN, FUNCTION_NOT_FOUND])
def test_any_one_call_may_fail(name: Any, code: int) -> None:
    whole, reading = read(H100), read({**H100, name: NVMLError(code)})
    lost = [each for each in _FIGURES if getattr(reading, each) is None]
    told = [each for each in _FIGURES if each not in lost]
    assert len(lost) <= 1
    for each in told:
        assert getattr(reading, each) == getattr(whole, each)
    assert len(reading.problems) == len(lost)


def test_a_card_that_supports_nothing_is_a_reading_without_figures() -> None:
    reading = read({})
    assert all(getattr(reading, name) is None for name in _FIGURES)
    assert not reading.is_throttling
    assert reading.limit_c is None
    assert len(reading.problems) == len(_FIGURES)
    assert "power: NVML says 3" in reading.problems


def test_what_a_card_cannot_tell_is_asked_again_but_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nvml, clock = FakeNvml(A10G), Clock()
    card = NvmlCard(UUID, nvml=nvml, clock=clock)
    with caplog.at_level(logging.INFO):
        for _ in range(50):
            card.read()
            clock.now += 0.5
    assert nvml.asked.count((FIELD, 82)) == 1
    assert nvml.asked.count(("nvmlDeviceGetPowerUsage",)) == 50
    assert sum("memory temperature" in record.message for record in caplog.records) == 1
    nvml.answers[(FIELD, 82)] = 55
    clock.now += 3600
    reading = card.read()
    assert reading is not None
    assert reading.memory_temperature_c == 55.0


_QUESTIONS = {
    "temperature_c": ("nvmlDeviceGetTemperatureV", 0),
    "margin_c": "nvmlDeviceGetMarginTemperature",
    "power_w": "nvmlDeviceGetPowerUsage",
    "power_cap_w": "nvmlDeviceGetEnforcedPowerLimit",
    "energy_j": "nvmlDeviceGetTotalEnergyConsumption",
    "sm_clock_mhz": ("nvmlDeviceGetClockInfo", 1),
    "clocks_event_reasons": "nvmlDeviceGetCurrentClocksEventReasons",
}
_ABSURD = [0xFFFFFFFF, 2**64 - 1, -5000, math.nan, math.inf, object(), "61", True]


@pytest.mark.parametrize(
    ("figure", "garbage"),
    [
        (figure, garbage)
        for figure in _QUESTIONS
        for garbage in _ABSURD
        if (figure, garbage) != ("energy_j", 0xFFFFFFFF)  # 4.3 MJ are nothing special
    ],
)
def test_garbage_counts_as_not_told(figure: str, garbage: Any) -> None:
    reading = read({**H100, _QUESTIONS[figure]: garbage})
    assert getattr(reading, figure) is None
    assert len(reading.problems) == 1
    assert "cannot be" in reading.problems[0]


@pytest.mark.parametrize("field", [0, 255, 0xFFFFFFF0])
def test_a_memory_without_sensor_may_answer_anything(field: int) -> None:
    assert read({**H100, (FIELD, 82): field}).memory_temperature_c is None


@given(
    st.dictionaries(
        st.sampled_from(list(H100)),
        st.one_of(
            st.integers(),
            st.floats(),
            st.text(),
            st.builds(NVMLError, st.integers(0, 1000)),
            st.binary(),
        ),
    )
)
def test_whatever_a_driver_says_readings_never_raise(changes: dict[Any, Any]) -> None:
    reading = NvmlCard(UUID, nvml=FakeNvml({**H100, **changes})).read()
    if reading is not None:
        figures = [getattr(reading, name) for name in _FIGURES]
        assert all(figure is None or math.isfinite(figure) for figure in figures)


def test_settings_choose_the_source(tmp_path: Path) -> None:
    script = tmp_path / "heat.yaml"
    script.write_text("replicas: [{temperature_c: 50}]")
    assert isinstance(open_source(UUID, ThermalSettings()), NvmlCard)
    assert open_source(None, ThermalSettings()) is None
    assert open_source(UUID, ThermalSettings(source="off")) is None
    scripted = ThermalSettings(source="scripted", script=str(script))
    for uuid in (UUID, None):
        assert isinstance(open_source(uuid, scripted, pool="denoiser"), ScriptedHeat)


def test_without_nvml_there_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    card = NvmlCard(UUID)
    assert card.read() is None
    assert "pynvml" in str(card.problem)


def test_a_slice_of_a_card_reads_the_whole_and_says_so() -> None:
    for uuid in (f"MIG-{SLICE}", SLICE):
        nvml = FakeNvml({**H100, "nvmlDeviceGetMigMode": (1, 1)})
        nvml.cards.add(f"MIG-{SLICE}")
        reading = NvmlCard(uuid, nvml=nvml).read()
        assert reading is not None
        assert reading.temperature_c == 61.0
        assert any("MIG" in problem and "whole" in problem for problem in reading.problems)


def test_a_prefix_is_allowed() -> None:
    assert NvmlCard(f"GPU-{UUID}", nvml=FakeNvml(H100)).read() is not None
