"""Clock, power, temperature and energy of a card while something runs on it, by NVML."""

from __future__ import annotations

import statistics
import threading
import time
from types import TracebackType
from typing import Any

import torch

from cluster.heat_reading import Reading
from cluster.nvml_card import NvmlCard
from deployments.card_uuid import card_uuid
from deployments.energy import EnergyMeter

_INTERVAL_S = 0.1


class GpuReadings:
    """Reads a card ten times a second in a thread, from entry to exit of the context.

    Args:
        device: A CUDA device as torch names it, found by its UUID; any other gives no readings.
    """

    def __init__(self, device: torch.device) -> None:
        self._energy = EnergyMeter(device)
        uuid = card_uuid(device)
        self._card = None if uuid is None else NvmlCard(uuid)
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

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What was read, in order."""
        return tuple(self._readings)

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
        if self._card is None:
            return
        while not self._stop.wait(_INTERVAL_S):
            reading = self._card.read()
            if reading is not None:
                self._readings.append(reading)


def _low_median_high(values: list[float]) -> list[float] | None:
    return [min(values), statistics.median(values), max(values)] if values else None
