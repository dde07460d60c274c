"""What the plan decided as gauges, set in Serve's controller, which is the one process that knows.

kelvin_pool_replicas{pool}, kelvin_pool_target_replicas{pool}: replicas that run, and that should.
kelvin_pool_waiting_seconds{pool}: cool seconds of work that wait.
kelvin_pool_capacity_ratio{pool}, kelvin_pool_demand_ratio{pool}: cool seconds a second that its
replicas can do now, and that come.
kelvin_pool_derated_replicas{pool}: replicas that count for less, for heat.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

_GAUGES = {
    "replicas": ("kelvin_pool_replicas", "Replicas that take requests."),
    "target": ("kelvin_pool_target_replicas", "Replicas that the plan asks for."),
    "waiting_s": ("kelvin_pool_waiting_seconds", "Work that waits, in seconds when cool."),
    "capacity": ("kelvin_pool_capacity_ratio", "Cool seconds of work a second that it can do."),
    "demand": ("kelvin_pool_demand_ratio", "Cool seconds of work a second that come."),
}
_DERATED = ("kelvin_pool_derated_replicas", "Replicas that count for less, for heat.")


def show_in_gauges(snapshot: Mapping[str, Any]) -> None:
    """Set the gauges of every pool.

    Args:
        snapshot: As `cluster.serve_planner.Planner` puts together.
    """
    for pool, shown in snapshot["pools"].items():
        for name, (metric, meaning) in _GAUGES.items():
            _gauge(metric, meaning).set(float(shown[name]), tags={"pool": pool})
        _gauge(*_DERATED).set(float(len(shown["derated"])), tags={"pool": pool})


@functools.cache
def _gauge(name: str, meaning: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, meaning, tag_keys=("pool",))
