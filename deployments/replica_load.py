"""What a replica tells of its load and heat: to the autoscaler, to the routing, and to people.

One `ReplicaState` is put together here; the stages send it along with their answers, Ray Serve
carries it to the autoscaler as bare numbers, and `/v1/status` shows it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from cluster.complaints import Complaints
from cluster.pool_state import ReplicaState
from cluster.reported_numbers import as_numbers

if TYPE_CHECKING:
    from cluster.thermal import Reading

_log = logging.getLogger("ray.serve")

_CALLS_REMEMBERED = 15


class Load(Protocol):
    """What a stage has to do; `deployments.engine_load.EngineLoad` is one. Cool seconds."""

    @property
    def waiting_s(self) -> float:
        """Of what has not begun."""

    @property
    def running_s(self) -> float:
        """Left of what has begun."""

    @property
    def requests(self) -> int:
        """Held."""

    @property
    def accepted(self) -> int:
        """Requests, ever."""

    @property
    def accepted_s(self) -> float:
        """Of all requests, ever."""

    @property
    def slowdown(self) -> float | None:
        """A forward's time over its time while the card was cool."""

    @property
    def duty(self) -> float:
        """Share of the time that it may compute."""

    @property
    def rows(self) -> int:
        """Of the last forward; 0 while there is nothing to do."""

    @property
    def step_s(self) -> float | None:
        """Of one guided step of the model's usual size."""

    @property
    def holds(self) -> frozenset[str]:
        """What it has at hand and works on, as keys for the routing (`cluster.work_keys`)."""


@dataclass(frozen=True)
class CallLoad:
    """The load of a stage whose requests are single calls."""

    waiting_s: float
    running_s: float
    requests: int
    accepted: int
    accepted_s: float
    slowdown: float | None = None
    duty: float = 1.0
    rows: int = 0
    step_s: float | None = None
    holds: frozenset[str] = frozenset()


class CallMeter:
    """Counts the calls of a text or decode replica; used from any thread.

    A call's cool seconds are the median of its last ones: nothing tells such a stage how fast its
    card was while cool, and it computes too seldom to heat one.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=_CALLS_REMEMBERED)
        self._waiting = 0
        self._running = 0
        self._accepted = 0
        self._accepted_s = 0.0

    def came(self) -> None:
        """Note a call that has to be computed."""
        with self._guard:
            self._waiting += 1
            self._accepted += 1
            self._accepted_s += self._typical()

    def began(self, calls: int = 1) -> None:
        """Note that calls which waited are computed now."""
        with self._guard:
            self._waiting -= calls
            self._running += calls

    def left(self) -> None:
        """Note that a call which waited was given up."""
        with self._guard:
            self._waiting -= 1

    def ended(self, calls: int = 1) -> None:
        """Note that calls have been computed, or have failed."""
        with self._guard:
            self._running -= calls

    def took(self, seconds: float) -> None:
        """Note what one call took; its share, where several were computed together."""
        with self._guard:
            self._seconds.append(seconds)

    def load(self) -> CallLoad:
        """Return how things stand."""
        with self._guard:
            typical = self._typical()
            return CallLoad(
                waiting_s=self._waiting * typical,
                running_s=self._running * typical,
                requests=self._waiting + self._running,
                accepted=self._accepted,
                accepted_s=self._accepted_s,
            )

    def _typical(self) -> float:
        return median(self._seconds) if self._seconds else 0.0


def replica_state(
    replica: str, load: Load, reading: Reading | None = None, reading_age_s: float | None = None
) -> ReplicaState:
    """Return what a replica tells of itself now.

    Args:
        replica: Its id.
        load: Its work.
        reading: The newest of its card; None: there is none.
        reading_age_s: Since that was taken.
    """
    return ReplicaState(
        id=replica,
        waiting_s=load.waiting_s,
        running_s=load.running_s,
        requests=load.requests,
        accepted=load.accepted,
        accepted_s=load.accepted_s,
        slowdown=load.slowdown,
        duty=load.duty,
        margin_c=None if reading is None else reading.margin_c,
        throttled=reading is not None and reading.is_throttling,
        reasons=None if reading is None else reading.clocks_event_reasons,
        power_w=None if reading is None else reading.power_w,
        reading_age_s=None if reading is None else reading_age_s,
        scripted=reading is not None and reading.source == "scripted",
        rows=load.rows,
        step_s=load.step_s,
        holds=load.holds,
    )


def shown_load(state: ReplicaState) -> dict[str, Any]:
    """Return a replica's load as `/v1/status` shows it; seconds are cool seconds."""
    return {
        "waiting_s": round(state.waiting_s, 3),
        "running_s": round(state.running_s, 3),
        "requests": state.requests,
        "accepted": state.accepted,
        "accepted_s": round(state.accepted_s, 3),
        "slowdown": None if state.slowdown is None else round(state.slowdown, 3),
        "duty": round(state.duty, 3),
        "rows": state.rows,
        "step_s": None if state.step_s is None else round(state.step_s, 4),
    }


class Statistics:
    """Answers Ray Serve's `record_autoscaling_stats`, whatever happens.

    Serve stops asking a replica for good if its first answer is of a wrong type.

    Args:
        state: Of the replica, now.
    """

    def __init__(self, state: Callable[[], ReplicaState]) -> None:
        self._state = state
        self._complaints = Complaints(_log)

    def numbers(self) -> dict[str, float]:
        """Return the replica's state as numbers; none where it cannot be told."""
        try:
            return as_numbers(self._state())
        except Exception as error:
            self._complaints.about(error, "this replica cannot tell its load")
            return {}
