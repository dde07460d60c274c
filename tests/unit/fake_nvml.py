"""A driver with one card, as pynvml shows it: answers and errors are what a test puts in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

UUID = "7f1c2a54-0000-1111-2222-333344445555"
SLICE = "0e0e0e0e-0000-1111-2222-333344445555"

UNINITIALIZED, NOT_SUPPORTED, NOT_FOUND, DRIVER_NOT_LOADED = 1, 3, 6, 9
FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 13, 15, 999

FIELD = "nvmlDeviceGetFieldValues"
THRESHOLD = "nvmlDeviceGetTemperatureThreshold"


class NVMLError(Exception):
    """As pynvml's: carries nvmlReturn_t in `value`."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML says {value}")
        self.value = value


class FakeNvml:
    """Answers by function name and argument; an NVMLError among the answers is raised."""

    NVMLError = NVMLError
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, answers: dict[Any, Any]) -> None:
        self.answers = dict(answers)
        self.cards = {f"GPU-{UUID}"}
        self.fails: NVMLError | None = None
        self.users = 0
        self.asked: list[Any] = []

    def nvmlInit(self) -> None:
        if self.fails is not None:
            raise self.fails
        self.users += 1

    def nvmlShutdown(self) -> None:
        self.users -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.cards:
            raise NVMLError(NOT_FOUND)
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        assert handle == f"MIG-{SLICE}"
        return f"GPU-{UUID}"

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:
        (field,) = fields
        try:
            answer = self._answer((FIELD, field), handle)
        except NVMLError as error:
            return [SimpleNamespace(nvmlReturn=error.value, valueType=1, value=None)]
        if answer >= 0:
            value = SimpleNamespace(uiVal=answer, siVal=None)
            return [SimpleNamespace(nvmlReturn=0, valueType=1, value=value)]
        value = SimpleNamespace(uiVal=answer + 2**32, siVal=answer)
        return [SimpleNamespace(nvmlReturn=0, valueType=5, value=value)]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)
        return lambda handle, *arguments: self._answer((name, *arguments), handle)

    def _answer(self, question: tuple[Any, ...], handle: str) -> Any:
        assert handle == f"GPU-{UUID}", "another card was asked"
        if self.fails is not None:
            raise self.fails
        self.asked.append(question)
        answer = self.answers.get(question, self.answers.get(question[0]))
        if answer is None:
            raise NVMLError(NOT_SUPPORTED)
        if isinstance(answer, NVMLError):
            raise answer
        return answer


COMMON = {
    "nvmlDeviceGetMigMode": (0, 0),
    "nvmlDeviceGetPowerUsage": 697_100,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTotalEnergyConsumption": 123_456_789,
    ("nvmlDeviceGetClockInfo", 1): 1365,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
}
H100 = {
    **COMMON,
    ("nvmlDeviceGetTemperatureV", 0): 61,
    "nvmlDeviceGetMarginTemperature": 24,
    (FIELD, 82): 71,
    (FIELD, 193): -8,
    (FIELD, 194): -2,
    (FIELD, 195): 0,
    (FIELD, 196): 0,
    (THRESHOLD, 0): 95,
    (THRESHOLD, 1): 89,
    (THRESHOLD, 2): 95,
    (THRESHOLD, 3): 87,
}
A10G = {
    **COMMON,
    ("nvmlDeviceGetTemperature", 0): 71,
    (THRESHOLD, 0): 98,
    (THRESHOLD, 1): 95,
    (THRESHOLD, 3): 88,
}
V100 = {
    **COMMON,
    ("nvmlDeviceGetTemperature", 0): 60,
    (FIELD, 82): 75,
    (THRESHOLD, 0): 90,
    (THRESHOLD, 1): 87,
    (THRESHOLD, 2): 85,
    (THRESHOLD, 3): 83,
}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
