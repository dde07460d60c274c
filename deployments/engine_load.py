"""How much an engine has to do, and how fast it does it: for routing and for the autoscaler.

Work is counted in cool seconds: what its steps take one request at a time, by what forwards took
at start-up, before anything was warm. What a batch saves is not counted: it is room to spare.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from deployments.live_request import Clock, LiveRequest, Ticket, most_rows, token_shape
from deployments.payloads import DenoiseJob
from deployments.step_costs import StepCosts, TokenShape

_LATELY_S = 15.0
_FEWEST = 3  # forwards, of which a speed can be told
_MOST = 64


@dataclass(frozen=True)
class EngineLoad:
    """The engine's part of `cluster.pool_state.ReplicaState`; seconds are cool seconds."""

    waiting_s: float = 0.0
    running_s: float = 0.0
    requests: int = 0
    accepted: int = 0
    accepted_s: float = 0.0
    slowdown: float | None = None
    duty: float = 1.0


class LoadMeter:
    """Counts work as it comes and goes; used from any thread.

    Args:
        costs: As measured at start-up; copied, for the engine goes on measuring into it.
        clock: In seconds.
    """

    def __init__(self, costs: StepCosts, clock: Clock) -> None:
        self._cool = StepCosts.from_json(costs.as_json())
        self._known = {(entry["height"], entry["width"]) for entry in costs.as_json()["costs"]}
        self._clock = clock
        self._guard = threading.Lock()
        self._left: dict[int, float] = {}
        self._ratios: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._accepted = 0
        self._accepted_s = 0.0

    def cool_seconds(self, job: DenoiseJob) -> float:
        """Return what all of a job's steps take alone on the cool card."""
        steps = job.num_inference_steps
        return self._seconds(token_shape(job), steps, steps * most_rows(job))

    def accepted(self, job: DenoiseJob) -> None:
        """Note that a job came."""
        seconds = self.cool_seconds(job)
        with self._guard:
            self._accepted += 1
            self._accepted_s += seconds

    def took(self, shape: TokenShape, rows: int, seconds: float) -> None:
        """Note what a forward took; its speed counts only where start-up measured the size."""
        if (shape.height, shape.width) not in self._known:
            return
        with self._guard:
            cool = self._cool.seconds(shape, rows)
            self._ratios.append((self._clock(), seconds / cool))

    def stepped(self, live: LiveRequest) -> None:
        """Note what is left of a request after a step."""
        work = None if live.is_finished else live.work()
        left = 0.0 if work is None else self._seconds(live.shape, work.steps_left, work.rows_left)
        with self._guard:
            self._left[live.ticket.key] = left

    def ended(self, ticket: Ticket) -> None:
        """Forget a request."""
        with self._guard:
            self._left.pop(ticket.key, None)

    def load(self, tickets: Iterable[Ticket], duty: float) -> EngineLoad:
        """Return how things stand.

        Args:
            tickets: Of all requests that the engine holds.
            duty: Share of the time that it may compute.
        """
        held = list(tickets)
        with self._guard:
            left = dict(self._left)
            now = self._clock()
            recent = [ratio for at, ratio in self._ratios if now - at <= _LATELY_S]
            accepted, accepted_s = self._accepted, self._accepted_s
        return EngineLoad(
            waiting_s=sum(self.cool_seconds(each.job) for each in held if each.key not in left),
            running_s=sum(left.get(each.key, 0.0) for each in held),
            requests=len(held),
            accepted=accepted,
            accepted_s=accepted_s,
            slowdown=median(recent) if len(recent) >= _FEWEST else None,
            duty=duty,
        )

    def _seconds(self, shape: TokenShape, steps: int, rows: int) -> float:
        with self._guard:
            alone = self._cool.seconds(shape, 1)
            if rows == steps:
                return steps * alone
            return steps * alone + (rows - steps) * (self._cool.seconds(shape, 2) - alone)
