"""Threshold scaling on what cards report, as keda-gpu-scaler does: the second rival.

KEDA hands a metric to Kubernetes' horizontal autoscaler, which wants
ceil(replicas x value / target) of them, leaves 10 % alone, adds at most four or as many as there
are every 15 s, and takes away only what it wanted to for the whole stabilisation window. The text
and decode stages stay cool whatever they do, so here they follow Serve's queue-only default.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.simulation.cards import Cards
from cluster.simulation.pool import Pool
from cluster.simulation.queue_only import QueueOnly, QueueOnlySettings

_TOLERANCE = 0.1
_MOST_ADDED = 4


@dataclass(frozen=True)
class ThresholdSettings:
    """Of the scaler.

    Attributes:
        metric: Mean temperature of the cards in degrees, or mean share of time they are busy.
        target: Of it.
        every_s: Between decisions.
        scale_in_window_s: That fewer replicas must have been enough for.
    """

    metric: Literal["temperature", "utilisation"] = "temperature"
    target: float = 60.0
    every_s: float = 15.0
    scale_in_window_s: float = 300.0


def wanted(replicas: int, value: float, target: float) -> int:
    """Return what the horizontal autoscaler wants, before windows and bounds."""
    ratio = value / target
    if abs(ratio - 1) <= _TOLERANCE:
        return replicas
    return math.ceil(replicas * ratio)


class Threshold:
    """Scales denoisers by a threshold."""

    def __init__(self, settings: ThresholdSettings, cards: Cards) -> None:
        self._settings = settings
        self._cards = cards
        self._others = QueueOnly(QueueOnlySettings())
        self._wishes: dict[str, deque[tuple[float, int]]] = {}
        self._next: dict[str, float] = {}
        self.busy_share = np.zeros(len(cards.kinds))

    def decide(self, now: float, pools: list[Pool]) -> dict[str, int]:
        """Return the target of each pool."""
        targets = self._others.decide(now, [one for one in pools if one.spec.stage != "denoise"])
        for pool in pools:
            if pool.spec.stage == "denoise":
                targets[pool.spec.name] = self._decide(now, pool)
        return targets

    def _decide(self, now: float, pool: Pool) -> int:
        name, settings = pool.spec.name, self._settings
        if now < self._next.get(name, 0.0) or not pool.replicas:
            return pool.target
        self._next[name] = now + settings.every_s
        cards = [replica.card for replica in pool.replicas]
        told = self._cards.readings_c if settings.metric == "temperature" else self.busy_share
        wish = wanted(len(cards), float(told[cards].mean()), settings.target)
        # As Kubernetes does: what there was at first counts as a wish.
        wishes = self._wishes.setdefault(name, deque([(now, pool.target)]))
        wishes.append((now, wish))
        while wishes[0][0] < now - settings.scale_in_window_s:
            wishes.popleft()
        if wish < pool.target:
            wish = min(max(wish for _, wish in wishes), pool.target)
        wish = min(wish, pool.target + max(_MOST_ADDED, pool.target))
        return max(pool.spec.minimum, min(pool.spec.maximum, wish))
