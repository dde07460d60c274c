"""Drivers go and come back under a running replica: no exception, one line in the log, a return."""

from __future__ import annotations

import logging

import pytest

from cluster.thermal import NvmlCard
from tests.unit.fake_nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    H100,
    NOT_FOUND,
    UNINITIALIZED,
    UUID,
    Clock,
    FakeNvml,
    NVMLError,
)


@pytest.mark.parametrize("code", [GPU_IS_LOST, UNINITIALIZED, DRIVER_NOT_LOADED])
def test_a_driver_that_goes_is_told_once_and_found_again(
    code: int, caplog: pytest.LogCaptureFixture
) -> None:
    nvml, clock = FakeNvml(H100), Clock()
    card = NvmlCard(UUID, nvml=nvml, clock=clock)
    assert card.read() is not None
    assert card.problem is None
    nvml.fails = NVMLError(code)
    with caplog.at_level(logging.INFO):
        for _ in range(40):
            assert card.read() is None
            assert card.problem == f"NVML says {code}"
            clock.now += 0.5
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert nvml.users == 0  # NVML starts anew only when nobody holds it
    nvml.fails = None
    clock.now += 10
    assert card.read() is not None
    assert card.problem is None
    assert nvml.users == 1


def test_it_is_not_looked_for_at_every_reading() -> None:
    nvml, clock = FakeNvml(H100), Clock()
    nvml.cards.clear()
    card = NvmlCard(UUID, nvml=nvml, clock=clock)
    assert card.read() is None
    nvml.cards.add(f"GPU-{UUID}")
    clock.now += 0.5
    assert card.read() is None  # too soon to look
    clock.now += 10
    assert card.read() is not None


def test_a_card_that_is_not_there_keeps_no_driver_busy() -> None:
    nvml, clock = FakeNvml(H100), Clock()
    nvml.cards.clear()
    card = NvmlCard(UUID, nvml=nvml, clock=clock)
    for _ in range(5):
        assert card.read() is None
        assert card.problem == f"NVML says {NOT_FOUND}"
        clock.now += 10
    assert nvml.users == 0


def test_after_a_return_nothing_is_taken_for_unsupported() -> None:
    nvml, clock = FakeNvml({**H100, "nvmlDeviceGetPowerUsage": NVMLError(3)}), Clock()
    card = NvmlCard(UUID, nvml=nvml, clock=clock)
    first = card.read()
    assert first is not None
    assert first.power_w is None
    nvml.fails = NVMLError(GPU_IS_LOST)
    assert card.read() is None
    nvml.fails = None
    nvml.answers["nvmlDeviceGetPowerUsage"] = 100_000
    clock.now += 10
    second = card.read()
    assert second is not None
    assert second.power_w == 100.0


def test_a_bug_in_the_binding_costs_the_reading_only(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(H100)
    card = NvmlCard(UUID, nvml=nvml)

    def fails() -> None:
        raise RuntimeError("out of handles")

    monkeypatch.setattr(nvml, "nvmlInit", fails)
    assert card.read() is None
    assert card.problem == "RuntimeError: out of handles"


def test_a_strange_answer_about_slices_is_no_reason_not_to_read() -> None:
    reading = NvmlCard(UUID, nvml=FakeNvml({**H100, "nvmlDeviceGetMigMode": "what"})).read()
    assert reading is not None
    assert reading.problems == ()
