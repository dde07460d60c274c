"""Readings of one card by NVML. What cards tell is in a table of `cluster.nvml_margin`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from cluster.heat_reading import Reading
from cluster.nvml_answers import HOTTEST_C, Questions, bits, number
from cluster.nvml_device import NvmlDevice, NvmlGone
from cluster.nvml_margin import margin_c

_GPU_SENSOR = 0  # NVML_TEMPERATURE_GPU
_SM_CLOCK = 1  # NVML_CLOCK_SM
_MEMORY_TEMPERATURE_FIELD = 82  # NVML_FI_DEV_MEMORY_TEMP
_MILLI = 1e-3

_MOST_W = 20_000.0
_MOST_MHZ = 20_000.0
_MOST_J = 1e12  # 700 W for 45 years

_log = logging.getLogger(__name__)


class NvmlCard:
    """One card's readings by NVML; a `cluster.thermal.HeatSource`.

    Args:
        uuid: Of the card or of a MIG slice, with or without its prefix. Of a slice, the whole
            card is read, and `Reading.problems` says so.
        nvml: The module `pynvml` or what answers like it; imported on first use if absent.
        clock: Seconds, never going back.
    """

    def __init__(
        self, uuid: str, *, nvml: Any = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = NvmlDevice(uuid, nvml=nvml, clock=clock)
        self._clock = clock
        self._problem: str | None = None
        self._logged: set[str] = set()

    @property
    def description(self) -> str:
        """Where the readings come from, for people."""
        return f"NVML, card {self._device.uuid}"

    @property
    def problem(self) -> str | None:
        """Why the last `read` gave nothing, in words; None if it gave something."""
        return self._problem

    def read(self) -> Reading | None:
        """Ask the card everything; None while there is no card to ask. Never raises."""
        try:
            reading = self._read()
        except NvmlGone as gone:  # logged where it was noticed
            self._problem = str(gone)
            return None
        except Exception as error:
            # A card that cannot be read is a reason for care, never one to lose a replica.
            if self._problem is None:
                _log.warning("card %s cannot be read", self._device.uuid, exc_info=True)
            self._problem = f"{type(error).__name__}: {error}"
            return None
        self._problem = None
        return reading

    def _read(self) -> Reading:
        ask, field, questions = self._device.ask, self._device.ask_field, Questions()
        if self._device.is_split:
            questions.leave_open("slices", "MIG splits the card, and all figures are the whole's")
        at = self._clock()
        # 0 C is what drivers say that do not know.
        temperature = questions.first(
            "temperature",
            lambda: number(ask("nvmlDeviceGetTemperatureV", _GPU_SENSOR), 1.0, HOTTEST_C),
            lambda: number(ask("nvmlDeviceGetTemperature", _GPU_SENSOR), 1.0, HOTTEST_C),
        )
        memory_temperature = questions.first(
            "memory temperature",
            lambda: number(field(_MEMORY_TEMPERATURE_FIELD), 1.0, HOTTEST_C),
        )
        margin = margin_c(self._device, temperature, memory_temperature, questions)
        power = questions.first(
            "power", lambda: number(ask("nvmlDeviceGetPowerUsage"), 0.0, _MOST_W, _MILLI)
        )
        power_cap = questions.first(
            "power cap",
            lambda: number(ask("nvmlDeviceGetEnforcedPowerLimit"), 1.0, _MOST_W, _MILLI),
            lambda: number(ask("nvmlDeviceGetPowerManagementLimit"), 1.0, _MOST_W, _MILLI),
        )
        energy = questions.first(
            "energy",
            lambda: number(ask("nvmlDeviceGetTotalEnergyConsumption"), 0.0, _MOST_J, _MILLI),
        )
        sm_clock = questions.first(
            "SM clock", lambda: number(ask("nvmlDeviceGetClockInfo", _SM_CLOCK), 0.0, _MOST_MHZ)
        )
        reasons = questions.first(
            "clocks-event reasons",
            lambda: bits(ask("nvmlDeviceGetCurrentClocksEventReasons")),
            lambda: bits(ask("nvmlDeviceGetCurrentClocksThrottleReasons")),
        )
        self._log_new(questions.problems)
        return Reading(
            at=at,
            temperature_c=temperature,
            memory_temperature_c=memory_temperature,
            margin_c=margin,
            power_w=power,
            power_cap_w=power_cap,
            energy_j=energy,
            sm_clock_mhz=sm_clock,
            clocks_event_reasons=None if reasons is None else int(reasons),
            source="nvml",
            problems=questions.problems,
        )

    def _log_new(self, problems: tuple[str, ...]) -> None:
        for problem in problems:
            what = problem.partition(":")[0]
            if what not in self._logged:
                self._logged.add(what)
                _log.info("card %s does not tell its %s", self._device.uuid, problem)
