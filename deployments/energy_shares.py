"""Each request's share of the card's energy, by the work it had done.

The counter is read when a request is about to end, not after each forward: what was used since the
last reading is shared over everything that ran since, by rows x tokens.
"""

from __future__ import annotations

from typing import Protocol

from deployments.live_request import LiveRequest


class Meter(Protocol):
    """What is asked of `deployments.energy.EnergyMeter`."""

    def since_last(self) -> float | None:
        """Return joules used since the last call; None: not known."""


class EnergyShares:
    """Adds joules to live requests.

    Args:
        meter: Of the card; None where there is none.
    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._work: dict[LiveRequest, int] = {}
        self.total_joules: float | None = None if meter is None else 0.0

    def worked(self, live: LiveRequest, rows: int) -> None:
        """Note that a forward had so many rows of a request."""
        self._work[live] = self._work.get(live, 0) + rows * live.shape.tokens

    def settle(self) -> None:
        """Share what was used since the last time over all that worked since.

        Before and after a time of idling, so that what is used meanwhile is nobody's work.
        """
        joules = None if self._meter is None else self._meter.since_last()
        total = sum(self._work.values())
        for live, work in self._work.items():
            if joules is None or live.joules is None:
                live.joules = None
            else:
                live.joules += joules * work / total
        if joules is not None and self.total_joules is not None and self._work:
            self.total_joules += joules
        self._work.clear()
