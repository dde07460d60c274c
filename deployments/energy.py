"""Joules a card has used, from NVML's counter of total energy (millijoules since the driver came).

The counter is the whole card's. On a card that several processes share, it includes the
neighbours'; where MIG splits a card, no instance has a counter of its own and nothing is said. It
moves in ticks of tens of milliseconds, so one short forward may be told 0 and the next the energy
of both: sums over a picture are right, single forwards are not.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

_log = logging.getLogger(__name__)


class EnergyMeter:
    """Reads one card's energy; None wherever that cannot be known. Nothing here raises.

    Args:
        device: A CUDA device as torch names it. NVML ignores CUDA_VISIBLE_DEVICES and counts in
            another order, so the card is found by its UUID. Any other device has no counter.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._errors: tuple[type[Exception], ...] = ()
        self._last_mj: int | None = None
        if device.type == "cuda":
            self._find(device)
        self._last_mj = self._read()

    @property
    def is_available(self) -> bool:
        """Whether the card answered when it was last asked."""
        return self._last_mj is not None

    def since_last(self) -> float | None:
        """Return the joules used since the last call, or since construction.

        After an idle while, call it once and drop the answer: idling is nobody's work. None where
        there is no counter, where it did not answer now or the last time, or where it went back
        because the driver came anew.
        """
        before, self._last_mj = self._last_mj, self._read()
        if before is None or self._last_mj is None or self._last_mj < before:
            return None
        return (self._last_mj - before) / 1000

    def _find(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError:
            return
        self._errors = (pynvml.NVMLError, OSError)
        try:
            uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except (*self._errors, RuntimeError, AssertionError, AttributeError) as error:
            # torch asserts that a driver is there; builds without CUDA have no `uuid`.
            _log.info("no energy counter for %s: %s", device, error)
            return
        if _is_split(pynvml, handle):
            _log.info("no energy counter for %s: MIG splits the card", device)
            return
        self._nvml, self._handle = pynvml, handle

    def _read(self) -> int | None:
        if self._handle is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._errors as error:
            if self._last_mj is not None:
                _log.warning("the card's energy counter stopped answering: %s", error)
            return None


def _is_split(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # cards that cannot be split say NotSupported
        return False
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)
