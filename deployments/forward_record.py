"""What the engine's forwards took: for the policy, which decides by it, and for people."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, replace
from typing import Any

from deployments.payloads import Path
from deployments.step_costs import StepCosts, TokenShape


@dataclass(frozen=True)
class Member:
    """One request's part in a forward."""

    key: int  # of its ticket
    traceparent: str | None  # of its job
    step: int  # that the forward was for it, 1-based
    rows: int


@dataclass(frozen=True)
class Forward:
    """A forward that went well, as whoever owns the engine is told of it."""

    seconds: float
    shape: TokenShape
    rows: int
    path: Path
    members: tuple[Member, ...]


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing, for people and gauges."""

    live_requests: int = 0  # admitted and not finished
    waiting_requests: int = 0  # submitted and not admitted
    forwards: int = 0  # since the start
    last_rows: int = 0  # of the last forward
    last_forward_ms: float | None = None
    last_path: Path | None = None
    joules: float | None = None  # used by requests since the start; None: the card does not say

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


class ForwardRecord:
    """Written by the engine's thread, read by any.

    Args:
        costs: Observes what forwards take.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._observing = threading.Lock()
        self._seen: set[tuple[TokenShape, int]] = set()
        self._stats = EngineStats()

    def took(self, shape: TokenShape, rows: int, seconds: float, path: Path) -> None:
        """Note a forward that went well."""
        # The first of its kind also pays for what libraries load and allocate.
        is_first = (shape, rows) not in self._seen and not self._costs.is_measured(shape, rows)
        if seconds > 0 and not is_first:
            with self._observing:
                self._costs.observe(shape, rows, seconds)
        self._seen.add((shape, rows))
        self._stats = EngineStats(
            forwards=self._stats.forwards + 1,
            last_rows=rows,
            last_forward_ms=seconds * 1000,
            last_path=path,
        )

    def stats(self, live: int, waiting: int, joules: float | None) -> EngineStats:
        """Return what the engine is doing.

        Args:
            live: Requests admitted and not finished.
            waiting: Requests not admitted.
            joules: Used by requests since the start.
        """
        return replace(self._stats, live_requests=live, waiting_requests=waiting, joules=joules)

    def costs(self) -> dict[str, Any]:
        """Return `StepCosts.as_json`."""
        with self._observing:
            return self._costs.as_json()
