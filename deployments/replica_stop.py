"""Whether Ray Serve has asked this replica to go.

Serve tells the deployment's own class only once its calls are done, by `__del__`, which is too late
to hand them back. Before that only the actor around it knows, in a field that is no public API:
`Replica._shutting_down` of `ray/serve/_private/replica.py`, set first of all by
`perform_graceful_shutdown`: for scale-in, redeploys, and nodes that drain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray._private.worker import global_worker

_log = logging.getLogger("ray.serve")


def stop_signal() -> Callable[[], bool]:
    """Return what says, quickly and from any thread, whether this replica was asked to go.

    Where that cannot be known, which is logged, it never says so: calls then end where they are.
    """
    if not ray.is_initialized():
        return lambda: False
    replicas: list[Any] = [
        getattr(actor, "_replica_impl", None) for actor in global_worker.actors.values()
    ]
    for replica in replicas:
        if hasattr(replica, "_shutting_down"):
            return lambda: bool(replica._shutting_down)
    _log.warning("This Ray does not show that a replica is asked to go: its work will not move.")
    return lambda: False
