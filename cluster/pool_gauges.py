"""What the plan decided as metrics, from Serve's controller, which is the one process that knows.

Ratios and seconds are of cool H100s, so that pools on several kinds of card can be added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cluster.metric_spec import MetricSpec
from serve.recorders import Recorders

_POOL = {
    "replicas": MetricSpec(
        "kelvin_pool_replicas", "gauge", "{replica}", "Replicas that take requests.", ("pool",)
    ),
    "target": MetricSpec(
        "kelvin_pool_target_replicas",
        "gauge",
        "{replica}",
        "Replicas that the plan asks for.",
        ("pool",),
    ),
    "capacity": MetricSpec(
        "kelvin_pool_capacity_ratio",
        "gauge",
        "1",
        "Cool H100 seconds of work that a pool does a second, as hot as it is.",
        ("pool",),
    ),
    "derated_count": MetricSpec(
        "kelvin_pool_derated_replicas",
        "gauge",
        "{replica}",
        "Replicas that count for less, for heat.",
        ("pool",),
    ),
}
_STAGE = {
    "demand": MetricSpec(
        "kelvin_stage_demand_ratio",
        "gauge",
        "1",
        "Cool H100 seconds of work that come a second.",
        ("stage", "model"),
    ),
    "waiting_s": MetricSpec(
        "kelvin_stage_waiting_seconds",
        "gauge",
        "s",
        "Until what waits has begun, as fast as all pools of the stage are now.",
        ("stage", "model"),
    ),
}
_DECISIONS = MetricSpec(
    "kelvin_autoscaler_decisions_total",
    "counter",
    "{decision}",
    "Changes of a pool's number of replicas; direction up or down.",
    ("pool", "direction"),
    is_rare=True,
)
POOL_METRICS: Final[Mapping[str, MetricSpec]] = {
    spec.name: spec for spec in (*_POOL.values(), *_STAGE.values(), _DECISIONS)
}


class PoolGauges:
    """Of one application."""

    def __init__(self) -> None:
        self._to = Recorders()
        self._counted_to = float("-inf")

    def show(self, snapshot: Mapping[str, Any]) -> None:
        """Set the gauges of every pool and stage, and count what was decided since the last time.

        Args:
            snapshot: As `cluster.serve_planner.Planner` puts together; its last changes are in it.
        """
        for pool, shown in snapshot["pools"].items():
            for name, spec in _POOL.items():
                self._to.record(spec, float(shown[name]), {"pool": pool})
            stage = {"stage": shown["stage"], "model": shown["model"]}
            for name, spec in _STAGE.items():
                self._to.record(spec, float(shown[name]), stage)
        for change in snapshot["changes"]:
            if change["at"] <= self._counted_to:
                continue
            direction = "up" if change["after"] > change["before"] else "down"
            self._to.record(_DECISIONS, 1, {"pool": change["pool"], "direction": direction})
        self._counted_to = max(
            (self._counted_to, *(change["at"] for change in snapshot["changes"]))
        )
