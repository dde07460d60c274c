"""Taking a node out of Ray: its replicas are replaced elsewhere, then finish what they have.

Ray's own drain, as its autoscaler asks for it: nothing new is placed on the node, and Serve starts
a replacement of each replica there before it asks the old one to go. There is no way back in Ray
2.60: its raylet, once told, takes no word that would keep it, and ends when it is idle; a machine
that drained joins again by `ray start`. The call is not in Ray's public interface.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from cluster.drain_plan import Deployed, Node
from serve.app import APP_NAME
from serve.config import Settings
from serve.errors import ConfigurationError

_SERVES = ("RUNNING", "PENDING_MIGRATION")
_TEXT = "kelvin drain"


def cluster_nodes() -> list[Node]:
    """Return the nodes that are alive."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            hostname=node["NodeManagerHostname"],
            is_head="node:__internal_head__" in node["Resources"],
            free=free.get(node["NodeID"], {}),
            labels=node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def draining() -> set[str]:
    """Return the ids of nodes that take nothing new."""
    return set(_gcs().get_draining_nodes(timeout=10))


def deployed(settings: Settings) -> list[Deployed]:
    """Return what Serve runs.

    Args:
        settings: Of the service, which say what stage each of its pools is of.
    """
    stage_of = {pool.name: stage for stage, pools in settings.pools.items() for pool in pools}
    found = []
    for application, told in _details()["applications"].items():
        for name, deployment in told["deployments"].items():
            # A further model's pools may be named like nobody's: each is a stage then.
            stage = stage_of.get(name, name) if application == APP_NAME else name
            options = deployment["deployment_config"].get("ray_actor_options") or {}
            found.append(
                Deployed(
                    name=name,
                    stage=stage if application == APP_NAME else f"{application} {stage}",
                    needs=_needs(options),
                    selector=options.get("label_selector") or {},
                    nodes=tuple(
                        replica["node_id"]  # which one that starts may not have yet
                        for replica in deployment["replicas"]
                        if _word(replica["state"]) in _SERVES
                    ),
                )
            )
    return found


def replicas_on(node_id: str) -> int:
    """Return how many replicas a node has, those included that start or stop there."""
    return sum(
        replica.get("node_id") == node_id
        for application in _details()["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    )


def begin_drain(node_id: str, deadline_s: float | None) -> None:
    """Have a node drained; returns at once.

    Args:
        node_id: Hexadecimal.
        deadline_s: From now: replicas that are not replaced by then stop anyway, having been given
            their time to finish before it; None: never.

    Raises:
        ConfigurationError: Ray refuses.
    """
    from ray.core.generated import autoscaler_pb2

    deadline_ms = 0 if deadline_s is None else int((time.time() + deadline_s) * 1000)
    # Of Ray's two reasons the other one is refused where anything runs.
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = _gcs().drain_node(node_id, reason, _TEXT, deadline_ms)
    if not accepted:
        raise ConfigurationError(f"Ray does not drain it: {why}", field="node", value=node_id)


def _gcs() -> Any:
    return ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)


def _details() -> dict[str, Any]:
    found: dict[str, Any] = serve.context._get_global_client().get_serve_details()
    return found


def _word(state: Any) -> str:
    return str(getattr(state, "value", state))


def _needs(options: Mapping[str, Any]) -> dict[str, float]:
    needs = {
        # Serve's own default.
        "CPU": 1.0 if options.get("num_cpus") is None else float(options["num_cpus"]),
        "GPU": float(options.get("num_gpus") or 0.0),
        **{name: float(amount) for name, amount in (options.get("resources") or {}).items()},
    }
    if kind := options.get("accelerator_type"):
        needs[f"accelerator_type:{kind}"] = 0.001
    return {name: amount for name, amount in needs.items() if amount}
