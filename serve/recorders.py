"""Where metrics go: to Ray, which Prometheus scrapes, and by OTLP where an endpoint is set.

Neither is loaded before the first metric is recorded, and neither ever fails whoever records: what
cannot be told is not worth a request.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from cluster.metric_spec import MetricSpec

if TYPE_CHECKING:
    from serve.otlp_recorder import OtlpRecorder

OTLP_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
"""OpenTelemetry's own variable; `serve.telemetry.environment` sets it."""

_log = logging.getLogger("ray.serve")


class Recorder(Protocol):
    """Takes values of metrics."""

    def record(self, spec: MetricSpec, value: float, labels: Mapping[str, str]) -> None:
        """Add to a counter, set a gauge, or observe in a histogram."""


class RayRecorder:
    """Ray's metrics, exported as `ray_` and the name; Serve adds deployment and replica."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def record(self, spec: MetricSpec, value: float, labels: Mapping[str, str]) -> None:
        """Record by the metric of that name, which is made the first time."""
        metric = self._made.get(spec.name)
        if metric is None:
            metric = self._made[spec.name] = _ray_metric(spec)
        tags = dict(labels) or None
        if spec.kind == "counter":
            metric.inc(value, tags=tags)
        elif spec.kind == "gauge":
            metric.set(value, tags=tags)
        else:
            metric.observe(value, tags=tags)


def _ray_metric(spec: MetricSpec) -> Any:
    from ray.serve import metrics

    if spec.kind == "counter":
        return metrics.Counter(spec.name, spec.meaning, spec.labels)
    if spec.kind == "gauge":
        return metrics.Gauge(spec.name, spec.meaning, spec.labels)
    return metrics.Histogram(spec.name, spec.meaning, list(spec.buckets), spec.labels)


class Recorders:
    """All there are in this process, found when the first value comes."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._found: tuple[Recorder, ...] | None = None
        self._has_failed = False

    def record(self, spec: MetricSpec, value: float, labels: Mapping[str, str]) -> None:
        """Record everywhere; nowhere in a process that is neither Serve's nor has an endpoint."""
        for recorder in self._recorders():
            try:
                recorder.record(spec, value, labels)
            except Exception:
                if not self._has_failed:
                    self._has_failed = True
                    _log.exception("A metric cannot be recorded; further ones are not told of.")

    def is_empty(self) -> bool:
        """Whether recording does nothing."""
        return not self._recorders()

    def _recorders(self) -> tuple[Recorder, ...]:
        if self._found is None:
            with self._guard:
                if self._found is None:
                    self._found = _recorders()
        return self._found


def _recorders() -> tuple[Recorder, ...]:
    found: list[Recorder] = []
    if place() is not None:
        found.append(RayRecorder())
    if endpoint := os.environ.get(OTLP_ENDPOINT):
        found.append(otlp_recorder(endpoint))
    return tuple(found)


@functools.cache
def otlp_recorder(endpoint: str) -> OtlpRecorder:
    """Return the one of this process for an endpoint: each has a thread and a connection."""
    from serve.otlp_recorder import OtlpRecorder

    return OtlpRecorder(endpoint, place() or {})


def place() -> dict[str, str] | None:
    """Return which process of Serve's this is, in OpenTelemetry's terms; None: none of them."""
    if "ray" not in sys.modules:
        return None
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        context = serve.get_replica_context()
    except RayServeException:
        # The controller is an actor without a replica; a driver is neither.
        is_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
        return {"service.instance.id": "controller"} if is_actor else None
    return {
        "service.instance.id": context.replica_id.unique_id,
        "kelvin.pool": context.deployment,
        "kelvin.application": context.app_name,
    }
