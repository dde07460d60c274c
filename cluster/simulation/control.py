"""What a policy decides in a simulated cluster: the interface, and the two rivals behind it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from cluster.pool_state import Stage
from cluster.simulation.cards import Cards
from cluster.simulation.pool import Pool, Router
from cluster.simulation.queue_only import PowerOfTwo, QueueOnly, QueueOnlySettings
from cluster.simulation.thermal_model import Array
from cluster.simulation.threshold import Threshold, ThresholdSettings
from cluster.simulation.traffic import Request

_SMOOTHED_S = 15.0


class Control(Protocol):
    """One policy at work in one run.

    Attributes:
        one_pool: All kinds of card form a single denoiser pool, as one Serve deployment would.
    """

    one_pool: bool

    def most_ongoing(self, stage: Stage) -> int:
        """Return `max_ongoing_requests` of a stage's replicas."""

    def router(self, pool: str) -> Router:
        """Return what chooses among the replicas of a pool."""

    def choose_pool(self, pools: list[Pool], request: Request, now: float) -> Pool:
        """Return the denoiser pool that a request goes to."""

    def decide(self, now: float, pools: list[Pool]) -> dict[str, int]:
        """Return the target of each pool."""

    def tick(self, now: float, cards: Cards, busy: Array, pools: list[Pool]) -> None:
        """Hear how cards are after each tick; may change `cards.duty` and replicas' rows."""

    def report(self, now: float, pools: list[Pool]) -> None:
        """Hear of replicas' loads, at the interval at which they tell."""

    def told(self) -> dict[str, Any]:
        """Return what a report should say of the policy's own working."""


class RayQueueOnly:
    """Ray Serve as it comes: one deployment a stage, its queue and nothing else."""

    one_pool = True

    def __init__(self, settings: QueueOnlySettings, seed: int) -> None:
        self._settings = settings
        self._seed = seed
        self._scaler = QueueOnly(settings)

    def most_ongoing(self, stage: Stage) -> int:
        """Serve has one default for every deployment."""
        return self._settings.max_ongoing_requests

    def router(self, pool: str) -> Router:
        """Power of two choices."""
        return PowerOfTwo(f"router {self._seed} {pool}")

    def choose_pool(self, pools: list[Pool], request: Request, now: float) -> Pool:
        """There is but one."""
        return pools[0]

    def decide(self, now: float, pools: list[Pool]) -> dict[str, int]:
        """By queue length."""
        return self._scaler.decide(now, pools)

    def tick(self, now: float, cards: Cards, busy: Array, pools: list[Pool]) -> None:
        """Blind to heat."""

    def report(self, now: float, pools: list[Pool]) -> None:
        """Queue lengths are asked for when a request is routed."""

    def told(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class ThresholdScaling(RayQueueOnly):
    """The same with denoisers scaled by a threshold on what the cards report."""

    def __init__(self, settings: ThresholdSettings, seed: int, cards: Cards) -> None:
        super().__init__(QueueOnlySettings(), seed)
        self._threshold = Threshold(settings, cards)
        self._busy = np.zeros(len(cards.kinds))

    def decide(self, now: float, pools: list[Pool]) -> dict[str, int]:
        """By threshold."""
        return self._threshold.decide(now, pools)

    def tick(self, now: float, cards: Cards, busy: Array, pools: list[Pool]) -> None:
        """Keep a running mean of how busy each card is."""
        self._busy += (busy - self._busy) / _SMOOTHED_S
        self._threshold.busy_share = self._busy
