"""Each request's share of the card's energy, by the work it had done.

The counter is read when a request is about to end, not after each forward: what was used since the
last reading is shared over everything that ran since, by rows x tokens. Requests are known by
number here, so that nothing of one is kept once it has ended.
"""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """What is asked of `deployments.energy.EnergyMeter`."""

    def since_last(self) -> float | None:
        """Return joules used since the last call; None: not known."""


class EnergyShares:
    """Joules by request.

    Args:
        meter: Of the card; None where there is none, and then nothing is noted.
    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._work: dict[int, int] = {}  # since the last reading
        self._work_of_forgotten = 0
        self._joules: dict[int, float | None] = {}
        self.total_joules: float | None = None if meter is None else 0.0

    def worked(self, key: int, work: int) -> None:
        """Note that a forward had so many rows x tokens of a request."""
        if self._meter is not None:
            self._work[key] = self._work.get(key, 0) + work

    def settle(self) -> None:
        """Share what was used since the last time over all that worked since.

        Before and after a time of idling, so that what is used meanwhile is nobody's work.
        """
        if self._meter is None:
            return
        joules = self._meter.since_last()
        total = sum(self._work.values()) + self._work_of_forgotten
        for key, work in self._work.items():
            before = self._joules.get(key, 0.0)
            if joules is None or before is None:
                self._joules[key] = None
            else:
                self._joules[key] = before + joules * work / total
        if joules is not None and self.total_joules is not None and total:
            self.total_joules += joules
        self._work.clear()
        self._work_of_forgotten = 0

    def joules(self, key: int) -> float | None:
        """Return what a request has used up to the last reading; None: not known."""
        return None if self._meter is None else self._joules.get(key, 0.0)

    def forget(self, key: int) -> None:
        """Drop a request that has ended; the others do not pay for what it did."""
        self._work_of_forgotten += self._work.pop(key, 0)
        self._joules.pop(key, None)
