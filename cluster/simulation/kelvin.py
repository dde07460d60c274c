"""Kelvin at work in a simulated cluster: the real plan, the real routing and the real governor.

Without heat the plan and the routing know queues and demand only, and no card is governed.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from cluster.autoscaling import PlanMemory, PlanSettings, plan
from cluster.governor import Governor
from cluster.pool_state import PoolState, ReplicaState, Stage
from cluster.routing import RoutingSettings
from cluster.simulation.cards import Cards
from cluster.simulation.denoiser import Denoiser
from cluster.simulation.kelvin_routing import BoardRouter, quickest_pool
from cluster.simulation.kinds import kind
from cluster.simulation.pool import Pool, Replica, Router
from cluster.simulation.queue_only import PowerOfTwo
from cluster.simulation.scenario import Scenario
from cluster.simulation.thermal_model import Array
from cluster.simulation.traffic import Request

_MAX_ONGOING = 16  # what Kelvin ships with
_WATCHED_FROM_C = 14.0  # under its limit; a governor has nothing to do with cooler cards
_FORGOTTEN_AFTER_S = 60.0  # without work a card's measured speed says nothing any more
_MEASURED_SHARE = 0.5  # of a second's forwards in the measured slowdown
_READING_AGE_S = 0.5


class KelvinControl:
    """Kelvin, with heat or without.

    Args:
        scenario: For seconds to start and the like.
        seed: Of ties.
        cards: Of the cluster.
        heat: Whether it knows of heat.
    """

    one_pool = False

    def __init__(self, scenario: Scenario, seed: int, cards: Cards, heat: bool) -> None:
        self._scenario = scenario
        self._heat = heat
        self._seed = seed
        self._random = random.Random(f"kelvin {seed}")
        self._routing = RoutingSettings(heat=heat)
        self._cards = cards
        self._settings = PlanSettings(heat=heat)
        self._memory = PlanMemory()
        self._governors: dict[int, Governor] = {}
        number = len(cards.kinds)
        self._slowdown = np.ones(number)
        self._worked_at = np.full(number, -np.inf)
        self._routers: dict[str, BoardRouter] = {}
        self._reasons: list[str] = []
        self._states: dict[str, ReplicaState] = {}
        self._states_at = -1.0

    def most_ongoing(self, stage: Stage) -> int:
        """Of every stage the same."""
        return _MAX_ONGOING

    def router(self, pool: str) -> Router:
        """Text and decode replicas are all alike; denoisers are not."""
        if not pool.startswith("denoiser"):
            return PowerOfTwo(f"kelvin {self._seed} {pool}")
        self._routers[pool] = BoardRouter(self._routing, self._seed, self.load_of)
        return self._routers[pool]

    def choose_pool(self, pools: list[Pool], request: Request, now: float) -> Pool:
        """Where it will finish first."""
        if len(pools) == 1:
            return pools[0]
        model = self._scenario.model
        return quickest_pool(pools, self._routers, model, request, now, self._random, self._routing)

    def decide(self, now: float, pools: list[Pool]) -> dict[str, int]:
        """Ask the plan."""
        decided, self._memory = plan(
            [self._state(pool, now) for pool in pools], self._memory, now, self._settings
        )
        if decided.error is not None:
            raise decided.error  # figures of a plan that did not plan would be no one's
        for each in decided.decisions:
            if each.after != each.before:
                self._reasons.append(f"{now:.0f} s: {each.reason}")
        return decided.replicas

    def tick(self, now: float, cards: Cards, busy: Array, pools: list[Pool]) -> None:
        """Measure speeds, and let governors set duties."""
        worked = busy > 0.02
        self._worked_at[worked] = now
        measured = self._slowdown + _MEASURED_SHARE * (1 / cards.clock - self._slowdown)
        self._slowdown = np.where(worked, measured, self._slowdown)
        self._slowdown[now - self._worked_at > _FORGOTTEN_AFTER_S] = 1.0
        if self._heat:
            self._govern(now, cards, worked, pools)

    def report(self, now: float, pools: list[Pool]) -> None:
        """Let replicas tell their loads to the routing."""
        for pool in pools:
            router = self._routers.get(pool.spec.name)
            if router is not None:
                router.hear(now, self._scenario.report_every_s)

    def told(self) -> dict[str, Any]:
        """Return the first of the plan's reasons."""
        return {"decisions": len(self._reasons), "reasons": self._reasons[:400]}

    def load_of(self, replica: Replica, now: float) -> ReplicaState:
        """Return what a replica tells of itself; to the plan and the routing the same."""
        if now != self._states_at:
            self._states.clear()
            self._states_at = now
        state = self._states.get(replica.id)
        if state is None:
            state = self._states[replica.id] = self._read(replica, now)
        return state

    def _read(self, replica: Replica, now: float) -> ReplicaState:
        waiting, running = replica.backlog(now)
        card = replica.card
        if card < 0:
            return ReplicaState(
                replica.id,
                waiting,
                running,
                replica.ongoing,
                replica.accepted,
                replica.accepted_s,
            )
        cards = self._cards
        margin = float(cards.limit_c[card] - round(cards.temperature_c[card]))
        measured = now - self._worked_at[card] <= _FORGOTTEN_AFTER_S
        return ReplicaState(
            id=replica.id,
            waiting_s=waiting,
            running_s=running,
            requests=replica.ongoing,
            accepted=replica.accepted,
            accepted_s=replica.accepted_s,
            slowdown=float(self._slowdown[card]) if measured and self._heat else None,
            duty=float(cards.duty[card]),
            margin_c=margin if self._heat else None,
            throttled=bool(cards.throttled_at(card)) and self._heat,
            power_w=float(cards.power_w[card]),
            reading_age_s=_READING_AGE_S if self._heat else None,
            holds=replica.holds,
        )

    def _govern(self, now: float, cards: Cards, worked: Any, pools: list[Pool]) -> None:
        watched = cards.occupied & (cards.temperature_c > cards.limit_c - _WATCHED_FROM_C)
        needed = set(np.flatnonzero(watched).tolist()) | self._governors.keys()
        if not needed:
            return
        on_card = {
            replica.card: replica
            for pool in pools
            if pool.spec.stage == "denoise"
            for replica in (*pool.replicas, *pool.draining.values())
        }
        for card in sorted(needed):
            replica = on_card.get(card)
            if not isinstance(replica, Denoiser):
                # Nobody runs there; the next replica has a governor of its own.
                self._governors.pop(card, None)
                cards.duty[card] = 1.0
                continue
            governor = self._governors.setdefault(card, Governor())
            allowed = governor.observe(
                now,
                float(round(cards.temperature_c[card])),
                float(cards.limit_c[card]),
                bool(cards.throttled_at(card)),
                bool(worked[card]),
            )
            cards.duty[card] = allowed.duty
            replica.most_rows = allowed.most_rows
            if governor.at_rest and not watched[card]:
                del self._governors[card]

    def _state(self, pool: Pool, now: float) -> PoolState:
        spec = pool.spec
        card = kind(spec.kind)
        return PoolState(
            name=spec.name,
            stage=spec.stage,
            model=self._scenario.model,
            kind=spec.kind if spec.stage == "denoise" else "CPU",
            replicas=tuple(self.load_of(replica, now) for replica in pool.replicas),
            target=pool.target,
            minimum=spec.minimum,
            maximum=spec.maximum,
            queued=float(len(pool.waiting)),
            request_s=pool.offered_s / pool.offered if pool.offered else None,
            kind_speed=card.speed if spec.stage == "denoise" else 1.0,
            cost_per_hour=card.cost_per_hour,
            start_s=spec.start_s,
        )
