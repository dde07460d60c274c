"""One run of a plan in locust's process: its clock, what is left, and the record it leaves."""

from __future__ import annotations

import time
from pathlib import Path

from gevent.event import Event

from loadtest.load_plan import Ask, LoadPlan
from loadtest.outcomes import BEGAN, OUTCOMES, PICTURES, Outcome, write_outcome

_LEAD_S = 0.2


class Run:
    """Where a run stands.

    Args:
        plan: What is to be asked.
        folder: For the outcomes, the time zero of the run by `time.time`, and pictures.
        kept: How many pictures to keep, evenly over the plan.
    """

    def __init__(self, plan: LoadPlan, folder: Path, kept: int) -> None:
        self._plan = plan
        self._pictures = folder / PICTURES
        self._pictures.mkdir(parents=True, exist_ok=True)
        self._clock = folder / BEGAN
        self._record = (folder / OUTCOMES).open("w", encoding="utf-8")
        self._every = max(1, len(plan.asks) // kept) if kept else 0
        self._left = len(plan.asks)
        self._began = 0.0
        self._unready = {ask.door for ask in plan.asks}
        self._all_ready = Event()

    def begin_together(self, door: str) -> None:
        """Wait until every door's user is connected; time zero is a moment after that."""
        self._unready.discard(door)
        if not self._unready:
            self._began = time.monotonic() + _LEAD_S
            self._clock.write_text(repr(time.time() + _LEAD_S), encoding="utf-8")
            self._all_ready.set()
        self._all_ready.wait()

    @property
    def now(self) -> float:
        """Seconds of the run; of use once it has begun."""
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        """Whether every request has its outcome."""
        return self._left <= 0

    def claim(self, door: str) -> list[Ask]:
        """Return the requests of a door, in order."""
        return [ask for ask in self._plan.asks if ask.door == door]

    def record(self, outcome: Outcome) -> None:
        """Write down what became of a request."""
        write_outcome(outcome, self._record)
        self._left -= 1

    def keep(self, number: int, picture: bytes) -> str | None:
        """Keep a picture if it is one of those to be looked at; return its file's name."""
        if not self._every or number % self._every:
            return None
        name = f"{number:06}.png"
        (self._pictures / name).write_bytes(picture)
        return name
