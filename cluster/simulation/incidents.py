"""What happens to cards over time: warmer air, failing fans, power caps, spot reclaims.

The same seed gives the same incidents to the same cards, whatever policy runs on them.
"""

from __future__ import annotations

import heapq
import random
from typing import Literal, NamedTuple

import numpy as np

from cluster.simulation.cards import Cards
from cluster.simulation.scenario import (
    Ambient,
    FailedCooling,
    PowerCap,
    Scenario,
    SpotReclaims,
)


class CardChange(NamedTuple):
    """A card is about to be taken away, is gone, or is back."""

    at: float
    card: int
    what: Literal["notice", "gone", "back"]


class Incidents:
    """Tells cards and the cluster what happens.

    Args:
        scenario: Says what may happen.
        kinds: Shape (cards,), names of kinds.
        seed: Draws which cards, and when.
    """

    def __init__(self, scenario: Scenario, kinds: list[str], seed: int) -> None:
        self._random = random.Random(f"incidents {seed}")
        self._kinds = kinds
        self._pending = sorted(
            (one for one in scenario.events if not isinstance(one, SpotReclaims)),
            key=lambda one: one.at_s,
        )
        self._warming: list[tuple[float, float, float]] = []  # degrees a second, since, until
        self._changes: list[CardChange] = []
        for event in scenario.events:
            if isinstance(event, SpotReclaims):
                self._draw_reclaims(event, scenario.duration_s)
        heapq.heapify(self._changes)

    def happen(self, before: float, now: float, cards: Cards) -> list[CardChange]:
        """Change what happened to cards between two times; return what happened to replicas."""
        while self._pending and self._pending[0].at_s <= now:
            event = self._pending.pop(0)
            if isinstance(event, Ambient):
                rate = event.by_c / event.within_s
                self._warming.append((rate, event.at_s, event.at_s + event.within_s))
            elif isinstance(event, FailedCooling):
                cards.fail_cooling(self._draw(event.share), event.hindrance)
            elif isinstance(event, PowerCap):
                cards.cap_power(self._draw(event.share), event.of_load)
        for rate, since, until in self._warming:
            cards.warm_air(rate * (min(now, until) - max(before, since)))
        self._warming = [one for one in self._warming if one[2] > now]
        happened = []
        while self._changes and self._changes[0].at <= now:
            happened.append(heapq.heappop(self._changes))
        return happened

    def _draw(self, share: float) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Draw that share of the cards of each kind, at least one."""
        drawn: list[int] = []
        for name in sorted(set(self._kinds)):
            cards = [card for card, kind in enumerate(self._kinds) if kind == name]
            drawn += self._random.sample(cards, max(1, round(share * len(cards))))
        return np.array(sorted(drawn), np.int64)

    def _draw_reclaims(self, event: SpotReclaims, until: float) -> None:
        for card in range(len(self._kinds)):
            at = self._random.expovariate(event.per_card_hour / 3600)
            while at < until:
                gone = at + event.notice_s
                self._changes.append(CardChange(at, card, "notice"))
                self._changes.append(CardChange(gone, card, "gone"))
                self._changes.append(CardChange(gone + event.away_s, card, "back"))
                at = gone + event.away_s + self._random.expovariate(event.per_card_hour / 3600)
