"""Kelvin's router as Serve makes it for a pool, with stand-ins for Serve's wrappers of replicas."""

from __future__ import annotations

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from cluster.serve_routing import KelvinRouter


class Replica:
    """Serve's wrapper of a replica, as far as routers use it."""

    node_id = availability_zone = "here"
    multiplexed_model_ids: tuple[str, ...] = ()
    max_ongoing_requests = 16

    def __init__(self, pool: str, name: str) -> None:
        self.replica_id = ReplicaID(name, DeploymentID(pool, "app"))

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def router_of(pool: str) -> KelvinRouter:
    """Return the router of a pool that one Pipeline sends work to."""
    router = KelvinRouter(
        deployment_id=DeploymentID(pool, "app"),
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    router.initialize_state(pipelines=1)
    return router
