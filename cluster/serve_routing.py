"""Ray Serve's request router for a pool: where `cluster.routing` says the work is done first.

Serve keeps its own rules: it is handed ranks of replicas, asks the first rank for room (by what it
remembers, else by a message), goes on to the next where there is none, and waits and asks again
where nobody has any. A replica that refuses is tried no more for now. While no replica has told its
load, and whenever anything here fails, Serve's own power of two choices decides.

While every replica has enough to do, work waits here: it then goes to whoever is free first, also
to a replica that only then starts, while what was once sent stays where it is. Serve asks again
twice a second, which leaves nobody idle: who is no longer full still has seconds of work.

A burst is routed before any of it is sent, so each request counts where it will go as soon as that
is chosen: the next one of the burst goes elsewhere. Serve pickles this very module by value; what
outlives a router is in `cluster.process_boards`.
"""

from __future__ import annotations

import logging
import random
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter

from cluster.complaints import Complaints
from cluster.process_boards import PoolBoard, board_of

# The best alone, then these together: Serve takes the shortest queue of a rank, and messages to
# replicas that may be full go out at once.
_SECOND_RANK = 3
_LAST_RANK = 2
_MOST_EXPECTED = 4096
_BY_QUEUES = "routing by load failed; by queues instead"


class KelvinRouter(PowerOfTwoChoicesRequestRouter):
    """Made by Ray Serve in each process that has a handle to the pool."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pipelines = 1
        self._most_held: float = 0
        self._expected: OrderedDict[str, str] = OrderedDict()  # request -> where it should go
        self._complaints = Complaints(logging.getLogger("ray.serve"))
        self._by_name: dict[str, Any] = {}  # of all replicas; a thousand take long to be named

    def initialize_state(self, pipelines: int = 1, max_queued: int = 0, **_: Any) -> None:
        """Take the `request_router_kwargs` of the deployment; called by Serve before all else.

        Args:
            pipelines: Processes that send work to this pool.
            max_queued: With so many waiting requests Serve refuses more; -1 is no limit.
        """
        self._pipelines = pipelines
        # Half of them: what replicas may still take must never be refused for want of room here.
        self._most_held = float("inf") if max_queued < 0 else max_queued // 2

    @property
    def _board(self) -> PoolBoard:
        return board_of(self._deployment_id.name, self._pipelines)

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any | None = None
    ) -> list[list[Any]]:
        """Return ranks of replicas, the best first."""
        if pending_request is not None and pending_request.future.done():
            # Another task has sent it: Serve looks once more and ends this one.
            return [candidate_replicas[:1]]
        try:
            if self._stays_outside(pending_request):
                return []
            ranks = self._ranks(candidate_replicas, pending_request)
        except Exception as error:
            self._complaints.about(error, _BY_QUEUES)
            ranks = []
        if ranks:
            return ranks
        chosen: list[list[Any]] = await super().choose_replicas(candidate_replicas, pending_request)
        return chosen

    def _stays_outside(self, pending: Any | None) -> bool:
        """Whether no replica should have it yet."""
        board = self._board
        if pending is None or not board.has_heard:
            return False
        if self.num_pending_requests > self._most_held:
            return False
        board.forget_old_speeds()
        work = board.work(pending.args[0] if pending.args else None)
        full = board.loads.is_full(work, board.clock())
        if full:
            pending.routing_context.should_backoff = True
        return full

    def _ranks(self, candidates: list[Any], pending: Any | None) -> list[list[Any]]:
        board = self._board
        if pending is None or not board.has_heard or pending.metadata.multiplexed_model_id:
            return []
        board.forget_old_speeds()
        by_id = self._by_name
        if len(candidates) != len(by_id):
            by_id = _by_name(candidates)
        work = board.work(pending.args[0] if pending.args else None)
        now = board.clock()
        ranked = board.loads.ranked(work, now, most=1 + _SECOND_RANK)
        best, *others = [by_id[name] for name in ranked if name in by_id]
        request = pending.metadata.internal_request_id
        if request not in self._expected:  # it may come again, where there was no room
            name = best.replica_id.unique_id
            board.loads.sent(name, work, now)
            self._expected[request] = name
            if pending.args:
                board.outside.went(id(pending.args[0]))
            if len(self._expected) > _MOST_EXPECTED:  # of requests given up before they were sent
                self._expected.popitem(last=False)
        # Without this Serve would ask again at once, and for ever, where nobody has room.
        pending.routing_context.should_backoff = True
        drawn = random.sample(candidates, min(_LAST_RANK + len(ranked), len(candidates)))
        rest = [each for each in drawn if each.replica_id.unique_id not in ranked]
        # Those last are for when the best have no room: nobody waits while somebody has.
        return [[best], others, rest[:_LAST_RANK]]

    def update_replicas(self, replicas: list[Any]) -> None:
        """Take over which replicas there are; called by Serve."""
        super().update_replicas(replicas)
        self._keep()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Take a dead replica out; called by Serve."""
        super().on_replica_actor_died(replica_id)
        self._keep()

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note where a request went; called by Serve."""
        super().on_request_routed(pending_request, replica_id, result)
        try:
            name = replica_id.unique_id
            if pending_request.args:
                self._board.outside.went(id(pending_request.args[0]))
            expected = self._expected.pop(pending_request.metadata.internal_request_id, None)
            if expected == name:
                return
            work = self._board.work(pending_request.args[0] if pending_request.args else None)
            self._board.loads.sent(name, work, self._board.clock())
            if expected is not None:
                self._board.loads.finished(expected)
        except Exception as error:
            self._complaints.about(error, _BY_QUEUES)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Note the end of a request; called by Serve."""
        super().on_request_completed(replica_id, internal_request_id)
        try:
            self._board.loads.finished(replica_id.unique_id)
        except Exception as error:
            self._complaints.about(error, _BY_QUEUES)

    def _keep(self) -> None:
        try:
            self._by_name = _by_name(self.curr_replicas.values())
            self._board.keep(list(self._by_name))
        except Exception as error:
            self._complaints.about(error, _BY_QUEUES)


def _by_name(replicas: Iterable[Any]) -> dict[str, Any]:
    return {replica.replica_id.unique_id: replica for replica in replicas}
