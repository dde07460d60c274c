"""What waits at a pool that has lost its replicas goes to another pool of its stage, always.

Serve's router takes calls back from a replica that died and keeps them, for ever if no other comes.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from cluster.pool_state import ReplicaState
from cluster.process_boards import PoolBoard, board_of
from cluster.routing import RoutingSettings
from serve.config import load_settings
from serve.pool_choice import PoolChoice
from tests.unit.pool_routers import Replica, router_of

_numbers = itertools.count()
START_S = 3.0


class Clock:
    """Of all pools' boards; it goes on when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def two_pools(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, others_speed: float = 0.01
) -> tuple[PoolChoice, str, str]:
    """Return the choice between two pools of decoders; nobody has told yet who is in them.

    By default the other one is chosen only where nothing else is left: a start is sooner.
    """
    first, second = (f"decode-{next(_numbers)}" for _ in range(2))
    pools: list[dict[str, Any]] = [
        {"name": first, "start_s": START_S, "kind_speed": 1.0},
        {"name": second, "start_s": START_S, "kind_speed": others_speed},
    ]
    for name in (first, second):
        monkeypatch.setattr(board_of(name), "clock", clock)
    return PoolChoice(load_settings(None, {"vae_decoder": pools})), first, second


async def test_what_was_sent_to_a_node_that_is_lost_goes_on_elsewhere_whatever_was_told_meanwhile(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    choice, lost, other = two_pools(clock, monkeypatch, others_speed=0.5)
    router = router_of(lost)
    replica: Any = Replica(lost, "a")
    router.update_replicas([replica])
    with choice.sending("decode", object()) as pool:
        assert pool == lost
        clock.now += 5.0
        # Serve's controller does not know of the end yet and tells once more who there is: it does
        # so whenever another pool of the process has news.
        router.update_replicas([replica])
        clock.now += 10.0
        assert not choice.is_vain(lost, 15.0), "as far as is known, the replica works on it"
        router.on_replica_actor_died(replica.replica_id)
        clock.now += 1.0
        assert choice.is_vain(lost, 16.0)
        board_of(other).keep([])
        assert not choice.is_vain(lost, 16.0), "the other pool has none either"
        clock.now += 3600.0
        assert not choice.is_vain(lost, 3616.0)
        board_of(other).keep(["b"])
        assert choice.is_vain(lost, 3616.0)
        assert choice.pool("decode") == other
    board_of(lost).keep(["c"])
    assert not choice.is_vain(lost, 3616.0)


async def test_what_a_lost_pool_held_goes_on_at_once_and_not_after_the_time_of_a_start(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    choice, lost, other = two_pools(clock, monkeypatch)
    router = router_of(lost)
    replica: Any = Replica(lost, "a")
    router.update_replicas([replica])
    board_of(other).keep(["b"])
    with choice.sending("decode", object()) as pool:
        assert pool == lost
        clock.now += START_S / 4
        router.on_replica_actor_died(replica.replica_id)
        clock.now += START_S / 4
        assert choice.is_vain(lost, START_S / 2)
        assert not choice.is_vain(lost, START_S / 8), "sent after the loss"


def test_what_is_sent_to_an_empty_pool_waits_as_long_as_a_start_may_take(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    choice, empty, other = two_pools(clock, monkeypatch)
    board_of(other).keep(["b"])
    board_of(empty).keep(["a"])
    with choice.sending("decode", object()):
        pass
    clock.now += 600.0
    board_of(empty).keep([])  # for want of work, say
    clock.now += 1.0
    with choice.sending("decode", object()):
        clock.now += START_S
        assert not choice.is_vain(empty, START_S)
        clock.now += 2 * START_S
        assert choice.is_vain(empty, 3 * START_S)


def test_a_replica_that_is_heard_of_while_it_is_taken_out_stays_out(
    monkeypatch: pytest.MonkeyPatch,
):
    board = PoolBoard(RoutingSettings())
    board.keep(["a"])
    hearing = threading.Thread(target=board.heard, args=(ReplicaState(id="a"),))
    taken_out = board.loads.keep

    def interrupted(ids: list[str]) -> None:
        taken_out(ids)
        hearing.start()
        hearing.join(0.2)  # it may have to wait until all is done

    monkeypatch.setattr(board.loads, "keep", interrupted)
    board.keep([])
    hearing.join(10.0)
    assert not len(board.loads)
