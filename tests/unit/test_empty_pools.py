"""Pools without replicas: neither a failure nor, once they have shrunk, a place to send work to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from cluster.pool_state import ReplicaState
from cluster.process_boards import PoolBoard
from cluster.routing import RoutedWork, RoutingSettings
from serve.readiness import Readiness


class Empty:
    """A handle to a deployment without replicas."""

    def broadcast(self, method: str) -> Any:
        raise DeploymentUnavailableError(DeploymentID(name="denoiser"))


class Store:
    async def exists(self, key: str) -> bool:
        return False


@pytest.mark.parametrize("may_be_empty", [True, False])
async def test_only_a_pool_that_starts_by_itself_may_be_empty(may_be_empty: bool) -> None:
    stages: Any = SimpleNamespace(pools={"denoise": {"denoiser": Empty()}})
    store: Any = Store()
    allowed = frozenset({"denoiser"}) if may_be_empty else frozenset[str]()
    readiness = Readiness(stages, store, allowed)
    found = await readiness.check()
    assert found["ready"] is may_be_empty, found
    assert await readiness.replicas() == {"denoise": []}


def test_a_replica_on_its_way_out_is_no_place_for_work() -> None:
    board = PoolBoard(RoutingSettings())
    board.keep(["a"])
    board.heard(ReplicaState(id="a"))
    assert board.loads.soonest(RoutedWork(1.0), board.clock()) is not None
    board.keep([])
    board.heard(ReplicaState(id="a"))
    assert board.loads.soonest(RoutedWork(1.0), board.clock()) is None
