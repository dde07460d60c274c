"""What the plan decided as gauges, set in Serve's controller, which is the one process that knows.

kelvin_pool_replicas{pool}, kelvin_pool_target_replicas{pool}: replicas that run, and that should.
kelvin_pool_capacity_ratio{pool}: cool H100 seconds of work that its replicas do a second, as hot as
they are.
kelvin_pool_derated_replicas{pool}: replicas that count for less, for heat.
kelvin_stage_demand_ratio{stage, model}: cool H100 seconds of work that come a second.
kelvin_stage_waiting_seconds{stage, model}: seconds until what waits has begun, as fast as all pools
of the stage are now.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

_POOL = {
    "replicas": ("kelvin_pool_replicas", "Replicas that take requests."),
    "target": ("kelvin_pool_target_replicas", "Replicas that the plan asks for."),
    "capacity": ("kelvin_pool_capacity_ratio", "Cool H100 seconds of work a second it can do."),
    "derated_count": ("kelvin_pool_derated_replicas", "Replicas that count for less, for heat."),
}
_STAGE = {
    "demand": ("kelvin_stage_demand_ratio", "Cool H100 seconds of work that come a second."),
    "waiting_s": ("kelvin_stage_waiting_seconds", "Seconds until what waits has begun."),
}


def show_in_gauges(snapshot: Mapping[str, Any]) -> None:
    """Set the gauges of every pool, and of every stage of a model.

    Args:
        snapshot: As `cluster.serve_planner.Planner` puts together.
    """
    for pool, shown in snapshot["pools"].items():
        for name, (metric, meaning) in _POOL.items():
            _gauge(metric, meaning, "pool").set(float(shown[name]), tags={"pool": pool})
        tags = {"stage": shown["stage"], "model": shown["model"]}
        for name, (metric, meaning) in _STAGE.items():
            _gauge(metric, meaning, "stage", "model").set(float(shown[name]), tags=tags)


@functools.cache
def _gauge(name: str, meaning: str, *tags: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, meaning, tag_keys=tags)
