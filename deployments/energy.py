"""Joules a card has used, from NVML's counter of total energy (millijoules since the driver came).

The counter is the whole card's. On a card that several processes share, it includes the
neighbours'; where MIG splits a card, no instance has a counter of its own and nothing is said. It
moves in ticks of tens of milliseconds, so one short forward may be told 0 and the next the energy
of both: sums over a picture are right, single forwards are not.
"""

from __future__ import annotations

import logging

import torch

from cluster.nvml_device import NvmlDevice, NvmlSilence
from deployments.card_uuid import card_uuid

_log = logging.getLogger(__name__)


class EnergyMeter:
    """Reads one card's energy; None wherever that cannot be known. Nothing here raises.

    Args:
        device: A CUDA device as torch names it. NVML ignores CUDA_VISIBLE_DEVICES and counts in
            another order, so the card is found by its UUID. Any other device has no counter.
    """

    def __init__(self, device: torch.device) -> None:
        uuid = card_uuid(device)
        self._card = None if uuid is None else NvmlDevice(uuid)
        self._last_mj: int | None = None
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

    def _read(self) -> int | None:
        if self._card is None:
            return None
        try:
            if self._card.is_split:
                _log.info("no energy counter for %s: MIG splits the card", self._card.uuid)
                self._card = None
                return None
            return int(self._card.ask("nvmlDeviceGetTotalEnergyConsumption"))
        except NvmlSilence as silence:
            if self._last_mj is not None:
                _log.warning("the card's energy counter stopped answering: %s", silence)
            return None
