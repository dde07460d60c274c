"""Clock, power, temperature and energy of a card while something runs on it, by NVML."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from deployments.energy import EnergyMeter

_INTERVAL_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """One look at the card; None where it does not answer."""

    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None


class GpuReadings:
    """Reads a card ten times a second in a thread, from entry to exit of the context.

    Args:
        device: A CUDA device as torch names it, found by its UUID; any other gives no readings.
    """

    def __init__(self, device: torch.device) -> None:
        self._energy = EnergyMeter(device)
        self._nvml, self._handle = _find(device)
        self._readings: list[Reading] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-readings", daemon=True)
        self._began = self._seconds = 0.0
        self._joules: float | None = None

    def __enter__(self) -> GpuReadings:
        self._energy.since_last()
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._seconds = time.monotonic() - self._began
        self._joules = self._energy.since_last()
        self._stop.set()
        self._thread.join()

    @property
    def joules(self) -> float | None:
        """Energy of the whole card between entry and exit."""
        return self._joules

    def summary(self) -> dict[str, Any]:
        """Return means and ranges with units in their names; None where nothing was read.

        `mean_w` is the energy over the time where the card counts energy.
        """
        clocks = self._values("sm_clock_mhz")
        powers = self._values("power_w")
        temperatures = self._values("temperature_c")
        mean_w = statistics.fmean(powers) if powers else None
        if self._joules is not None and self._seconds > 0:
            mean_w = self._joules / self._seconds
        return {
            "seconds": self._seconds,
            "joules": self._joules,
            "mean_w": mean_w,
            "sm_clock_mhz": _low_median_high(clocks),
            "temperature_c": _low_median_high(temperatures),
            "readings": len(self._readings),
        }

    def _values(self, name: str) -> list[float]:
        values = (getattr(reading, name) for reading in self._readings)
        return [value for value in values if value is not None]

    def _watch(self) -> None:
        if self._handle is None:
            return
        while not self._stop.wait(_INTERVAL_S):
            self._readings.append(self._read())

    def _read(self) -> Reading:
        nvml, handle = self._nvml, self._handle

        def ask(what: str, *arguments: int) -> float | None:
            try:
                return float(getattr(nvml, what)(handle, *arguments))
            except nvml.NVMLError:
                return None

        milliwatts = ask("nvmlDeviceGetPowerUsage")
        return Reading(
            sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            power_w=None if milliwatts is None else milliwatts / 1000,
            temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        )


def _low_median_high(values: list[float]) -> list[float] | None:
    return [min(values), statistics.median(values), max(values)] if values else None


def _find(device: torch.device) -> tuple[Any, Any]:
    """Return NVML and the card's handle, or None twice."""
    if device.type != "cuda":
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (pynvml.NVMLError, OSError, RuntimeError, AttributeError) as error:
        _log.warning("no readings of %s: %s", device, error)
        return None, None
