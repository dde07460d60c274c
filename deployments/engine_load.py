"""How much an engine has to do, and how fast it does it: for routing and for the autoscaler.

Work is counted in cool seconds: what its steps take one request at a time, by what forwards took
at start-up, or later where they were lastingly quicker: a card may have been warm from who ran
there before. What a batch saves is not counted: it is room to spare.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from cluster.work_keys import size_key
from deployments.job_size import most_rows, token_shape
from deployments.live_request import LiveRequest
from deployments.payloads import DenoiseJob
from deployments.step_costs import StepCosts, TokenShape
from deployments.ticket import Clock, Ticket

_LATELY_S = 15.0
_FEWEST = 3  # forwards, of which a speed can be told
_MOST = 64
# A card that was warm or busy at start-up shows later that it can do better. So many forwards over
# so long must have been quicker, by more than cards and rooms differ from hour to hour.
_BETTER_OF = 32
_BETTER_OVER_S = 5.0
_BETTER_BY = 0.03


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
    rows: int = 0
    step_s: float | None = None
    holds: frozenset[str] = frozenset()


class LoadMeter:
    """Counts work as it comes and goes; used from any thread.

    Args:
        costs: As measured at start-up; copied, for the engine goes on measuring into it.
        clock: In seconds.
        usual: Of the model's pictures, by which cards are compared; None: they are not.
    """

    def __init__(self, costs: StepCosts, clock: Clock, usual: TokenShape | None = None) -> None:
        self._cool = StepCosts.from_json(costs.as_json())
        self._known = {(entry["height"], entry["width"]) for entry in costs.as_json()["costs"]}
        self._clock = clock
        self._guard = threading.Lock()
        self._left: dict[int, float] = {}
        self._usual = usual
        self._ratios: deque[tuple[float, float]] = deque(maxlen=_MOST)
        self._better: list[tuple[float, float]] = []
        self._baseline = 1.0  # share of what start-up measured that a cool forward really takes
        self._rows = 0
        self._accepted = 0
        self._accepted_s = 0.0

    def cool_seconds(self, job: DenoiseJob) -> float:
        """Return what the steps that a job still needs take alone on the cool card."""
        steps = job.steps_left
        return self._seconds(token_shape(job), steps, steps * most_rows(job))

    def accepted(self, job: DenoiseJob) -> None:
        """Note that a job came."""
        seconds = self.cool_seconds(job)
        with self._guard:
            self._accepted += 1
            self._accepted_s += seconds

    def took(self, shape: TokenShape, rows: int, seconds: float) -> None:
        """Note what a forward took; its speed counts only where start-up measured the size."""
        with self._guard:
            self._rows = rows
            if (shape.height, shape.width) not in self._known:
                return
            now, ratio = self._clock(), seconds / self._cool.seconds(shape, rows)
            self._ratios.append((now, ratio))
            self._note_better(now, ratio)

    def _note_better(self, now: float, ratio: float) -> None:
        """Take a card for as fast as it lastingly was, should start-up have found it slower."""
        self._better.append((now, ratio))
        if len(self._better) < _BETTER_OF or now - self._better[0][0] < _BETTER_OVER_S:
            return
        typical = median(each for _, each in self._better)
        self._better.clear()
        if typical < self._baseline * (1 - _BETTER_BY):
            self._baseline = typical

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
            baseline, rows = self._baseline, self._rows
        usual = self._usual
        return EngineLoad(
            waiting_s=sum(self.cool_seconds(each.job) for each in held if each.key not in left),
            running_s=sum(left.get(each.key, 0.0) for each in held),
            requests=len(held),
            accepted=accepted,
            accepted_s=accepted_s,
            slowdown=median(recent) / baseline if len(recent) >= _FEWEST else None,
            duty=duty,
            rows=rows if held else 0,
            step_s=None if usual is None else self._seconds(usual, 1, 2),
            holds=frozenset(size_key(each.job.width, each.job.height) for each in held),
        )

    def _seconds(self, shape: TokenShape, steps: int, rows: int) -> float:
        with self._guard:
            alone = self._cool.seconds(shape, 1)
            seconds = steps * alone
            if rows > steps:
                seconds += (rows - steps) * (self._cool.seconds(shape, 2) - alone)
            return seconds * self._baseline
