"""Joules from NVML's counter: right where there is one, None everywhere else, never an error."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.energy import EnergyMeter

CUDA = torch.device("cuda", 1)
UUID = "7f1c2a54-0000-1111-2222-333344445555"


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml:
    """Two cards; NVML counts them in another order than torch does."""

    NVMLError = NVMLError
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self) -> None:
        self.millijoules: dict[str, Any] = {f"GPU-{UUID}": 5_000, "GPU-other": 1_000_000}
        self.mig: Any = (0, 0)
        self.starts: Exception | None = None

    def nvmlInit(self) -> None:
        if self.starts is not None:
            raise self.starts

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.millijoules:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> Any:
        if isinstance(self.mig, Exception):
            raise self.mig
        return self.mig

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        answer = self.millijoules[handle]
        if isinstance(answer, Exception):
            raise answer
        return int(answer)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID)
    )
    return fake


def use(nvml: FakeNvml, millijoules: int) -> None:
    nvml.millijoules[f"GPU-{UUID}"] += millijoules
    nvml.millijoules["GPU-other"] += 777_000  # a neighbour in the same machine


def test_each_call_tells_what_was_used_since_the_one_before(nvml: FakeNvml):
    meter = EnergyMeter(CUDA)
    assert meter.is_available
    use(nvml, 2_500)
    assert meter.since_last() == 2.5
    assert meter.since_last() == 0.0
    use(nvml, 40)
    use(nvml, 2)
    assert meter.since_last() == 0.042


def test_cards_that_do_not_know_mig_are_not_split(nvml: FakeNvml):
    nvml.mig = NVMLError("Not Supported")
    assert EnergyMeter(CUDA).since_last() == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"starts": NVMLError("Driver Not Loaded")},
        {"starts": OSError("no library")},
        {"millijoules": {"GPU-other": 1}},
        {"millijoules": {f"GPU-{UUID}": NVMLError("Not Supported")}},
        {"mig": (1, 1)},
    ],
)
def test_no_counter_is_none(nvml: FakeNvml, change: dict[str, Any]):
    for name, value in change.items():
        setattr(nvml, name, value)
    meter = EnergyMeter(CUDA)
    assert not meter.is_available
    assert meter.since_last() is None
    assert meter.since_last() is None


def test_without_a_gpu_or_without_nvml_it_is_none(monkeypatch: pytest.MonkeyPatch):
    assert EnergyMeter(torch.device("cpu")).since_last() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert EnergyMeter(CUDA).since_last() is None


@pytest.mark.parametrize("error", [RuntimeError("no driver"), AssertionError("not compiled")])
def test_a_torch_without_the_card_is_none(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def fails(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    assert EnergyMeter(CUDA).since_last() is None


def test_a_driver_that_goes_and_comes_back_costs_its_reading_only(nvml: FakeNvml):
    meter = EnergyMeter(CUDA)
    nvml.millijoules[f"GPU-{UUID}"] = NVMLError("GPU is lost")
    assert meter.since_last() is None
    assert not meter.is_available
    nvml.millijoules[f"GPU-{UUID}"] = 9_000
    assert meter.since_last() is None  # nobody knows what was used meanwhile
    use(nvml, 1_000)
    assert meter.since_last() == 1.0
    nvml.millijoules[f"GPU-{UUID}"] = 0  # a driver loaded anew counts from nothing
    assert meter.since_last() is None
    use(nvml, 3_000)
    assert meter.since_last() == 3.0
