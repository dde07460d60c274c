"""The real routing behind a simulated pool: one process's `LoadBoard`, told loads with a delay."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cluster.load_board import LoadBoard
from cluster.pool_state import ReplicaState
from cluster.routing import (
    PoolLoad,
    ReplicaLoad,
    RoutedWork,
    RoutingSettings,
    choose_pool,
)
from cluster.simulation.kinds import kind, step_costs
from cluster.simulation.pool import Pool, Replica
from cluster.simulation.traffic import Request

_IDLE_TELLS_EVERY = 4  # times that busy ones do
_ASKED = 8  # replicas in order, before all others are


class BoardRouter:
    """Chooses the replica where a request will finish first.

    Args:
        settings: Of the routing.
        seed: Of chance.
        load_of: Returns what a replica tells of itself at a time.
    """

    def __init__(
        self,
        settings: RoutingSettings,
        seed: int,
        load_of: Callable[[Replica, float], ReplicaState],
    ) -> None:
        self.board = LoadBoard(settings, seed)
        self._joined_share = settings.joined_share
        self._load_of = load_of
        self._replicas: dict[str, Replica] = {}
        self._heard: dict[str, tuple[int, float]] = {}  # accepted by then, and when

    def pick(self, pool: Pool, request: Request, now: float) -> Replica | None:
        """Return the best replica that has a free place; None while all have enough to do."""
        if not self._replicas:
            return None
        most, replicas = pool.spec.max_ongoing_requests, self._replicas
        work = self.work(pool.replicas[0].own_s(request), request)
        if self.board.is_full(work, now):
            return None
        best = self.board.choose(work, now)
        if best is None or replicas[best].ongoing >= most:
            ranked = self.board.ranked(work, now, _ASKED) or []
            best = next((name for name in ranked if replicas[name].ongoing < most), None)
            if best is None:
                free = (name for name, one in replicas.items() if one.ongoing < most)
                best = next(free, None)
        if best is None:
            return None
        self.board.sent(best, work, now)
        return replicas[best]

    def work(self, own_s: float, request: Request) -> RoutedWork:
        """Return what `PoolBoard.work` says of a job of a size that it knows."""
        return RoutedWork(own_s, joins={request.size: self._joined_share * own_s})

    def joined(self, replica: Replica) -> None:
        """Choose from it, too."""
        self._replicas[replica.id] = replica
        self.board.keep(list(self._replicas))

    def left(self, replica: Replica) -> None:
        """Choose from it no more."""
        del self._replicas[replica.id]
        self._heard.pop(replica.id, None)
        self.board.keep(list(self._replicas))

    def hear(self, now: float, every_s: float) -> None:
        """Let replicas tell their loads: busy ones each time, others now and then."""
        for replica in self._replicas.values():
            accepted, at = self._heard.get(replica.id, (-1, 0.0))
            idle = replica.ongoing == 0 and replica.accepted == accepted
            if idle and now - at < _IDLE_TELLS_EVERY * every_s:
                continue
            self._heard[replica.id] = (replica.accepted if replica.ongoing == 0 else -1, now)
            state = self._load_of(replica, now)
            told = ReplicaLoad(
                id=replica.id,
                backlog_s=state.backlog_s,
                speed=state.speed,
                margin_c=state.margin_c,
                throttled=state.throttled,
                holds=state.holds,
            )
            self.board.report(told, now)


def quickest_pool(
    pools: list[Pool],
    routers: dict[str, BoardRouter],
    model: str,
    request: Request,
    now: float,
    random: Random,
    settings: RoutingSettings,
) -> Pool:
    """Return the pool where a request will finish first."""
    loads = []
    for pool in pools:
        card = kind(pool.spec.kind)
        own = request.steps * step_costs(card.name, model).seconds(request.shape, request.rows)
        router = routers[pool.spec.name]
        board = router.board
        usual_s = pool.offered_s / pool.offered if pool.offered else own
        loads.append(
            PoolLoad(
                name=pool.spec.name,
                soonest_s=board.soonest(router.work(own, request), now),
                kind_speed=card.speed,
                queued_s=len(pool.waiting) * usual_s,
                speed=board.speed,
                start_s=pool.spec.start_s,
                waited_s=now - pool.waiting_since if pool.waiting else 0.0,
            )
        )
    on_h100 = request.steps * step_costs("H100", model).seconds(request.shape, request.rows)
    chosen = choose_pool(loads, RoutedWork(on_h100), random, settings)
    return next(pool for pool in pools if pool.spec.name == chosen)
