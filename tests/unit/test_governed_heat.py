"""A card's readings on their way to the governor, and what people are shown of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cluster.governor import FREE, GovernorSettings
from cluster.heat_reading import Reading
from deployments.card_heat import CardHeat
from deployments.governed_heat import GovernedHeat
from serve.config import ThermalSettings
from serve.heat_settings import GovernorSection

CPU = torch.device("cpu")
HOT = Reading(at=0.0, temperature_c=84.0, margin_c=2.0)


@dataclass
class Watch:
    """Shows what a test says."""

    newest: Reading | None = None
    age_s: float | None = None

    def reads(self, reading: Reading) -> None:
        self.newest, self.age_s = reading, 0.0


def governed(watch: Watch) -> GovernedHeat:
    return GovernedHeat(watch, GovernorSettings())


def test_a_card_that_was_never_read_is_free() -> None:
    assert governed(Watch())() == FREE


def test_each_reading_is_taken_once_however_many_forwards_ask() -> None:
    watch, often, once = Watch(), Watch(), Watch()
    asked_often, asked_once = governed(often), governed(once)
    for second in range(1, 20):
        reading = replace(HOT, at=float(second))
        for watch in (often, once):
            watch.reads(reading)
        told = [asked_often() for _ in range(50)]
        assert set(told) == {asked_once()}
    assert told[0].duty < 1


def test_a_card_not_read_for_long_is_free_and_held_again_once_it_is() -> None:
    watch = Watch()
    heat = governed(watch)
    for second in range(30):
        watch.reads(replace(HOT, at=float(second)))
        held = heat()
    assert held.duty < 0.7
    watch.age_s = 9.0
    assert heat() == held
    watch.age_s = 11.0
    assert heat() == FREE
    watch.reads(replace(HOT, at=60.0))
    assert heat().duty < 0.7


def test_throttling_cuts_before_the_next_forward() -> None:
    watch = Watch()
    heat = governed(watch)
    watch.reads(Reading(at=0.0, temperature_c=70.0, margin_c=16.0))
    assert heat().duty == 1
    watch.reads(Reading(at=0.5, temperature_c=82.0, margin_c=5.0, clocks_event_reasons=0x04))
    assert heat().duty == 1  # the power cap is no throttling, and the average is still cool
    watch.reads(Reading(at=1.0, temperature_c=82.0, margin_c=5.0, clocks_event_reasons=0x40))
    assert heat().duty < 0.9


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "heat.yaml"
    file.write_text("replicas: [{temperature_c: 84, limit_c: 86, clocks_event_reasons: 0x24}]")
    return file


@pytest.fixture
def rehearsed(script: Path) -> Iterator[CardHeat]:
    thermal = ThermalSettings(source="scripted", script=str(script), period_s=0.05)
    heat = CardHeat(CPU, thermal, GovernorSection(), pool="denoiser")
    yield heat
    heat.close()


def test_a_rehearsal_holds_the_card_and_is_marked_in_what_is_shown(rehearsed: CardHeat) -> None:
    assert rehearsed.governor is not None
    allowance = rehearsed.governor()
    assert allowance.duty < 1
    shown = rehearsed.shown(allowance)
    assert shown is not None
    assert shown["scripted"] is True
    assert "rehearsal" in shown["source"]
    assert (shown["margin_c"], shown["limit_c"], shown["throttled"]) == (2.0, 86.0, True)
    assert shown["clocks_event_reasons"] == ["software power cap", "software thermal slowdown"]
    assert shown["governor"]["duty"] == round(allowance.duty, 3)


def test_a_script_that_went_is_told_and_the_last_readings_go_on(
    rehearsed: CardHeat, script: Path
) -> None:
    os.unlink(script)
    before = rehearsed.reading
    assert before is not None
    deadline = time.monotonic() + 10
    while not (rehearsed.reading and rehearsed.reading.problems):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    shown = rehearsed.shown(FREE)
    assert shown is not None
    assert shown["margin_c"] == 2.0
    assert "the last good one goes on" in shown["problems"][0]


def test_without_a_source_nothing_is_shown_and_nothing_held() -> None:
    heat = CardHeat(CPU, ThermalSettings(source="off"), GovernorSection())
    assert heat.governor is None
    assert heat.shown(FREE) is None
    assert heat.age_s is None
    heat.close()
