"""Metrics by OTLP over HTTP; loaded only where an endpoint is set."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from cluster.metric_spec import MetricSpec
from serve.otlp_complaints import quieten

_COUNT_EVERY_S = 1.0
_SEND_EVERY_MS = 10_000
_SEND_TIMEOUT_S = 5.0
_MOST_WAITING: Final = 20_000  # values, of which a busy replica has some hundred a second

_log = logging.getLogger("ray.serve")


class OtlpRecorder:
    """Takes note of values; a thread counts them every second, another sends every ten.

    The SDK takes some ten microseconds to count a value, three times that where its code has left
    the processor's caches since the last one; a picture has dozens of them, and a step would wait.

    Args:
        endpoint: Of all signals.
        resource: What this process is, beside the service's name.
    """

    def __init__(self, endpoint: str, resource: Mapping[str, str]) -> None:
        quieten()
        self._waiting: deque[tuple[MetricSpec, float, Mapping[str, str]]] = deque()
        self._counting = threading.Lock()
        self._is_closed = threading.Event()
        self._has_failed = False
        self._made: dict[str, Any] = {}
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(f"{endpoint}/v1/metrics", timeout=_SEND_TIMEOUT_S),
            export_interval_millis=_SEND_EVERY_MS,
        )
        self._provider = MeterProvider([reader], resource=Resource.create(dict(resource)))
        self._meter = self._provider.get_meter("kelvin")
        # At an exit before the provider sends for the last time: what is registered later is called
        # earlier.
        atexit.register(self._count_waiting)
        threading.Thread(target=self._count_now_and_then, name="otlp-metrics", daemon=True).start()

    def record(self, spec: MetricSpec, value: float, labels: Mapping[str, str]) -> None:
        """Take note of a value; whoever brings more than there is room for counts them."""
        self._waiting.append((spec, value, dict(labels)))
        if len(self._waiting) > _MOST_WAITING:
            self._count_waiting()

    def close(self) -> None:
        """Send what is left and stop."""
        self._is_closed.set()
        self._count_waiting()
        atexit.unregister(self._count_waiting)
        self._provider.shutdown(timeout_millis=_SEND_TIMEOUT_S * 1000)

    def _count_now_and_then(self) -> None:
        while not self._is_closed.wait(_COUNT_EVERY_S):
            self._count_waiting()

    def _count_waiting(self) -> None:
        """Count what waits now, in the order in which it came: of a gauge the last one stays."""
        with self._counting:
            for _ in range(len(self._waiting)):
                spec, value, labels = self._waiting.popleft()
                try:
                    self._count(spec, value, labels)
                except Exception:
                    if not self._has_failed:
                        self._has_failed = True
                        _log.exception("A metric cannot be counted; further ones are not told of.")

    def _count(self, spec: MetricSpec, value: float, labels: Mapping[str, str]) -> None:
        instrument = self._made.get(spec.name)
        if instrument is None:
            instrument = self._made[spec.name] = self._instrument(spec)
        if spec.kind == "counter":
            instrument.add(value, labels)
        elif spec.kind == "gauge":
            instrument.set(value, labels)
        else:
            instrument.record(value, labels)

    def _instrument(self, spec: MetricSpec) -> Any:
        about = {"unit": spec.unit, "description": spec.meaning}
        if spec.kind == "counter":
            return self._meter.create_counter(spec.otel_name, **about)
        if spec.kind == "gauge":
            return self._meter.create_gauge(spec.otel_name, **about)
        return self._meter.create_histogram(
            spec.otel_name, **about, explicit_bucket_boundaries_advisory=list(spec.buckets)
        )
