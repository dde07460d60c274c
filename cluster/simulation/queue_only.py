"""Ray Serve's own autoscaling and routing, reproduced: the first rival.

`replica_queue_length_autoscaling_policy` with its scaling factors at 1 and its delays
(`ray/serve/autoscaling_policy.py`), fed as Serve feeds it: handles push what runs and waits every
10 s, and the controller takes the mean over the last 30 s, the newest value holding until now
(`_merge_and_aggregate_timeseries` in `ray/serve/_private/autoscaling_state.py`). Requests go by
power of two choices on queue lengths, always fresh here, which favours it. Unlike Serve's, the
control loop turns once a second and not ten times; the delays are told by time either way.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass

from cluster.simulation.pool import Pool, Replica
from cluster.simulation.traffic import Request

_ELAPSED_EPSILON_S = 1e-6  # Serve's own, against rounding


@dataclass(frozen=True)
class QueueOnlySettings:
    """Those of Serve's `AutoscalingConfig`; the defaults are Serve's."""

    target_ongoing_requests: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    look_back_period_s: float = 30.0
    metrics_interval_s: float = 10.0
    max_ongoing_requests: int = 5


def desired(ongoing: float, running: int, target: int, settings: QueueOnlySettings) -> int:
    """Return the replicas wanted before any delay.

    Args:
        ongoing: Mean of requests that run and wait.
        running: Replicas now.
        target: Replicas asked for.
        settings: Of Serve.
    """
    if running == 0:
        return max(1, target) if ongoing > 0 else target
    wanted = running * (ongoing / (settings.target_ongoing_requests * running))
    scaled = math.ceil(running + (wanted - running))
    if math.ceil(wanted) < running and scaled == running:
        scaled -= 1
    return max(0, scaled)


class Delays:
    """Lets a wish through once it has lasted: `_apply_delay_logic`."""

    def __init__(self, settings: QueueOnlySettings) -> None:
        self._settings = settings
        self._counter = 0
        self._since: float | None = None

    def decide(self, wanted: int, target: int, now: float) -> int:
        """Return the target from now on."""
        if wanted == target:
            self._counter, self._since = 0, None
            return target
        way = 1 if wanted > target else -1
        if self._counter * way < 0:
            self._counter, self._since = 0, None
        self._counter += way
        delay = self._settings.upscale_delay_s if way > 0 else self._settings.downscale_delay_s
        if way < 0 and target != 1:
            wanted = max(1, wanted)
        if self._since is None:
            self._since = now
        if now - self._since + _ELAPSED_EPSILON_S < delay:
            return target
        self._counter, self._since = 0, None
        return wanted


class OngoingMean:
    """What the controller knows of a handle's requests: pushed at intervals, then averaged."""

    def __init__(self, settings: QueueOnlySettings) -> None:
        self._settings = settings
        self._recorded: deque[tuple[float, float]] = deque()
        self._pushed: list[tuple[float, float]] = []
        self._pushed_at = -math.inf

    def record(self, now: float, ongoing: float) -> None:
        """Take note of what runs and waits; push if it is time."""
        self._recorded.append((now, ongoing))
        while self._recorded[0][0] < now - self._settings.look_back_period_s:
            self._recorded.popleft()
        if now - self._pushed_at >= self._settings.metrics_interval_s:
            self._pushed, self._pushed_at = list(self._recorded), now

    def value(self, now: float) -> float:
        """Return the mean over time of what was pushed last."""
        if not self._pushed:
            return 0.0
        last = max(now - self._pushed[-1][0], 0.0) or 1e-3
        total = self._pushed[-1][1] * last
        for (at, value), (end, _) in zip(self._pushed, self._pushed[1:], strict=False):
            total += value * (end - at)
        return total / (self._pushed[-1][0] - self._pushed[0][0] + last)


class QueueOnly:
    """Scales every pool by its own queue."""

    def __init__(self, settings: QueueOnlySettings) -> None:
        self._settings = settings
        self._of: dict[str, tuple[OngoingMean, Delays]] = {}

    def decide(self, now: float, pools: list[Pool]) -> dict[str, int]:
        """Return the target of each pool."""
        return {pool.spec.name: self._decide(now, pool) for pool in pools}

    def _decide(self, now: float, pool: Pool) -> int:
        name = pool.spec.name
        if name not in self._of:
            self._of[name] = (OngoingMean(self._settings), Delays(self._settings))
        mean, delays = self._of[name]
        mean.record(now, len(pool.waiting) + sum(replica.ongoing for replica in pool.replicas))
        running = len(pool.replicas)
        if running == 0:
            return max(pool.target, pool.spec.minimum)
        wanted = desired(mean.value(now), running, pool.target, self._settings)
        decided = delays.decide(wanted, pool.target, now)
        return max(pool.spec.minimum, min(pool.spec.maximum, decided))


class PowerOfTwo:
    """Serve's routing: the shorter of two queues, of two replicas drawn at random."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def pick(self, pool: Pool, request: Request, now: float) -> Replica | None:
        """Return a replica with a free place; Serve draws again until it finds one."""
        most, replicas = pool.spec.max_ongoing_requests, pool.replicas
        if not replicas:
            return None
        found = self._shorter(replicas)
        if found.ongoing < most:
            return found
        free = [replica for replica in replicas if replica.ongoing < most]
        return self._shorter(free) if free else None

    def joined(self, replica: Replica) -> None:
        """Queue lengths are asked for, not kept."""

    def left(self, replica: Replica) -> None:
        """Likewise."""

    def _shorter(self, replicas: list[Replica]) -> Replica:
        if len(replicas) == 1:
            return replicas[0]
        draw, number = self._random.random, len(replicas)
        first = int(draw() * number)
        second = int(draw() * (number - 1))
        if second >= first:
            second += 1
        one, other = replicas[first], replicas[second]
        return one if one.ongoing <= other.ongoing else other
