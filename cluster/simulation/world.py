"""One run of one scenario under one policy: events between ticks of one second.

Arrivals and ends of stretches happen at their exact times. Once a second heat moves on for all
cards at once; what it does to their speeds moves the ends of stretches. Nothing but the seed is
random, and the clock is only a number.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.simulation.cards import Cards
from cluster.simulation.control import Control
from cluster.simulation.denoiser import Denoiser
from cluster.simulation.incidents import CardChange, Incidents
from cluster.simulation.kinds import kind, step_costs
from cluster.simulation.measures import Measures, Series
from cluster.simulation.one_by_one import OneByOne
from cluster.simulation.pool import Pool, PoolSpec, Replica
from cluster.simulation.scenario import Scenario, StageSettings
from cluster.simulation.traffic import requests_of

TICK_S = 1.0
_LONGEST_REST_S = 3600.0  # after the last arrival; what has not ended by then never does
_SPEED_STEP = 0.005  # of its value: smaller changes of speed are not followed


@dataclass(frozen=True)
class Outcome:
    """What a run comes to."""

    figures: dict[str, Any]
    series: Series
    told: dict[str, Any]


class World:
    """A cluster.

    Args:
        scenario: What there is and what happens.
        make_control: Returns the policy for these cards and this seed.
        seed: Of all that is random.
        progress: Called about every simulated minute with the seconds so far.
    """

    def __init__(
        self,
        scenario: Scenario,
        make_control: Callable[[Scenario, int, Cards], Control],
        seed: int,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.scenario = scenario
        self._progress = progress
        self._events: list[tuple[float, int, Pool, Replica, int]] = []
        self._sequence = 0
        self._busy: set[int] = set()
        kinds = [kind(some.kind) for some in scenario.cards for _ in range(some.number)]
        spreads = np.repeat(
            [some.spread for some in scenario.cards], [some.number for some in scenario.cards]
        )
        normal = np.random.default_rng([seed, 7]).standard_normal(len(kinds))
        self.cards = Cards(kinds, np.exp(spreads * normal))
        self._incidents = Incidents(scenario, [card.name for card in kinds], seed)
        self._by_card: list[Denoiser | None] = [None] * len(kinds)
        self._applied = np.ones(len(kinds))
        self.control = make_control(scenario, seed, self.cards)
        self.measures = Measures(scenario, self.cards)
        self._requests = requests_of(scenario, seed)
        self.text = self._stage("text", scenario.text, seed)
        self.decode = self._stage("decode", scenario.decode, seed)
        self.denoisers = self._denoiser_pools(seed)
        self.pools = [self.text, *self.denoisers, self.decode]

    def run(self) -> Outcome:
        """Run to the end of the last request."""
        scenario, events = self.scenario, self._events
        coming = next(self._requests, None)
        tick, number = TICK_S, 1
        last = scenario.duration_s + _LONGEST_REST_S
        while tick <= last:
            while coming is not None and coming.at < tick:
                while events and events[0][0] <= coming.at:
                    self._event()
                self.measures.came(coming)
                self.text.offer(coming, coming.at)
                coming = next(self._requests, None)
            while events and events[0][0] <= tick:
                self._event()
            self._tick(tick)
            if tick >= scenario.duration_s and self.measures.ended == self.measures.arrived:
                break
            number += 1
            tick = number * TICK_S
        return Outcome(self.measures.figures(), self.measures.series, self.control.told())

    def _event(self) -> None:
        now, _, pool, replica, version = heapq.heappop(self._events)
        if version != replica.version:
            return
        done, ends = replica.finish_stretch(now)
        if ends is not None:
            self._send(pool, replica, ends)
        elif replica.card >= 0:
            self._busy.discard(replica.card)
            self.cards.set_busy(replica.card, False, now)
        for request in done:
            if pool is self.text:
                self.control.choose_pool(self.denoisers, request, now).offer(request, now)
            elif pool is self.decode:
                self.measures.finished(request, now)
            else:
                self.decode.offer(request, now)
        if done:
            if pool.waiting:
                pool.place_waiting(now)
            pool.released(replica)

    def _send(self, pool: Pool, replica: Replica, ends: float) -> None:
        """Note a replica's next event."""
        self._sequence += 1
        heapq.heappush(self._events, (ends, self._sequence, pool, replica, replica.version))

    def _accepted(self, pool: Pool, replica: Replica, ends: float, now: float) -> None:
        if replica.card >= 0 and replica.card not in self._busy:
            self._busy.add(replica.card)
            self.cards.set_busy(replica.card, True, now)
        self._send(pool, replica, ends)

    def _tick(self, now: float) -> None:
        scenario, cards, control = self.scenario, self.cards, self.control
        busy = cards.tick(now)
        for change in self._incidents.happen(now - TICK_S, now, cards):
            self._change(change, now)
        control.tick(now, cards, busy, self.pools)
        self._follow_speeds(now)
        if now % scenario.report_every_s < TICK_S:
            control.report(now, self.pools)
        if now % scenario.decide_every_s < TICK_S:
            for name, target in control.decide(now, self.pools).items():
                self._pool(name).target = target
        for pool in self.pools:
            pool.reconcile(now)
        self.measures.tick(now, TICK_S, self.pools)
        if self._progress is not None and now % 60 < TICK_S:
            self._progress(min(now, scenario.duration_s))

    def _follow_speeds(self, now: float) -> None:
        speed = self.cards.clock * self.cards.duty
        changed = np.abs(speed - self._applied) > _SPEED_STEP * self._applied
        # Back at full speed is always followed, so that errors do not stay.
        changed |= (speed == 1) & (self._applied != 1)
        for card in np.flatnonzero(changed).tolist():
            self._applied[card] = speed[card]
            replica = self._by_card[card]
            if replica is not None:
                ends = replica.set_speed(float(speed[card]), now)
                if ends is not None:
                    self._send(self._pool_of(card), replica, ends)

    def _change(self, change: CardChange, now: float) -> None:
        card, pool = change.card, self._pool_of(change.card)
        replica = self._by_card[card]
        if change.what == "back":
            pool.put_back(card)
        elif change.what == "notice":
            # Serve gives a node that is about to go no further requests and starts anew elsewhere.
            pool.withdraw(card)
            if replica is not None and replica in pool.replicas:
                pool.drain(replica)
        else:
            if replica is not None:
                lost = replica.give_up()
                for request in lost:
                    request.restarts += 1
                self._busy.discard(card)
                self.cards.set_busy(card, False, now)
                pool.released(replica)
                pool.offer_again(lost, now)

    def _stage(self, name: Any, settings: StageSettings, seed: int) -> Pool:
        spec = PoolSpec(
            name=name,
            stage=name,
            kind=settings.kind,
            minimum=settings.minimum,
            maximum=settings.maximum,
            start_s=settings.start_s,
            max_ongoing_requests=self.control.most_ongoing(name),
        )
        pool = Pool(
            spec,
            self.control.router(name),
            lambda id, card: OneByOne(id, settings.seconds),
            None,
            f"pool {seed}",
            self._accepted,
        )
        pool.start_now(settings.initial, 0.0)
        return pool

    def _denoiser_pools(self, seed: int) -> list[Pool]:
        pools, first = [], 0
        places: list[list[int]] = []
        for some in self.scenario.cards:
            places.append(list(range(first, first + some.number)))
            first += some.number
        grouped = (
            [range(len(places))] if self.control.one_pool else [[at] for at in range(len(places))]
        )
        self._pool_at: list[Pool] = []
        for group in grouped:
            parts = [self.scenario.cards[at] for at in group]
            name = "denoiser" if self.control.one_pool else f"denoiser-{parts[0].kind.lower()}"
            spec = PoolSpec(
                name=name,
                stage="denoise",
                kind=parts[0].kind,
                minimum=sum(part.minimum for part in parts),
                maximum=sum(part.number for part in parts),
                start_s=max(part.start_s for part in parts),
                max_ongoing_requests=self.control.most_ongoing("denoise"),
            )
            cards = [card for at in group for card in places[at]]
            pool = Pool(
                spec,
                self.control.router(name),
                self._make_denoiser,
                cards,
                f"pool {seed}",
                self._accepted,
            )
            pool.took_card = self._took_card
            self._pool_at += [pool] * len(cards)
            pool.start_now(sum(part.initial for part in parts), 0.0)
            pools.append(pool)
        return pools

    def _make_denoiser(self, id: str, card: int) -> Denoiser:
        costs = step_costs(self.cards.kinds[card].name, self.scenario.model)
        replica = Denoiser(id, card, costs, self.scenario.keep_choice_steps)
        replica.speed = float(self._applied[card])
        self._by_card[card] = replica
        return replica

    def _took_card(self, card: int, taken: bool) -> None:
        self.cards.occupied[card] = taken
        if not taken:
            self._by_card[card] = None

    def _pool_of(self, card: int) -> Pool:
        return self._pool_at[card]

    def _pool(self, name: str) -> Pool:
        return next(pool for pool in self.pools if pool.spec.name == name)
