"""A tiny OpenTelemetry collector: reads and keeps the spans and metrics that come to it."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loadtest.otlp_sink import METRICS, TRACES, otlp_sink

_LONGEST_S = 60.0
_POLL_S = 0.05


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as it arrived."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    is_error: bool
    raw: str  # everything, to look for what must not be there
    began_ns: int
    ended_ns: int
    links: tuple[tuple[str, dict[str, Any]], ...]  # span id and attributes


@dataclass(frozen=True)
class ReceivedMetric:
    """One data point as it arrived."""

    name: str
    unit: str
    kind: str  # sum, gauge or histogram
    service: str
    attributes: dict[str, Any]
    value: float  # of a histogram its count


class OtlpReceiver:
    """The spans and metrics received so far, and where to send them."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[ReceivedSpan] = []
        self.metrics: list[ReceivedMetric] = []

    def wait(self, enough: Callable[[list[ReceivedSpan]], bool]) -> list[ReceivedSpan]:
        """Return the spans once `enough` of them says so.

        Raises:
            TimeoutError: It does not within a minute.
        """
        deadline = time.monotonic() + _LONGEST_S
        while not enough(self.spans):
            if time.monotonic() > deadline:
                raise TimeoutError(f"received only {[span.name for span in self.spans]}")
            time.sleep(_POLL_S)
        return list(self.spans)

    def wait_for_metric(self, name: str) -> list[ReceivedMetric]:
        """Return the metrics once there is one of that name.

        Raises:
            TimeoutError: There is none within a minute.
        """
        deadline = time.monotonic() + _LONGEST_S
        while all(metric.name != name for metric in self.metrics):
            if time.monotonic() > deadline:
                raise TimeoutError(f"received only { ({metric.name for metric in self.metrics}) }")
            time.sleep(_POLL_S)
        return list(self.metrics)


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """Run a receiver on a free loopback port."""
    receiver = OtlpReceiver()

    def take(path: str, body: bytes, encoding: str | None) -> None:
        message = gzip.decompress(body) if encoding == "gzip" else body
        if path == TRACES:
            receiver.spans.extend(_spans(message))
        elif path == METRICS:
            receiver.metrics.extend(_metrics(message))

    with otlp_sink(take) as receiver.endpoint:
        yield receiver


def _spans(body: bytes) -> Iterator[ReceivedSpan]:
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        about = _values(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    name=span.name,
                    service=str(about.get("service.name")),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    attributes=_values(span.attributes),
                    is_error=span.status.code == 2,
                    raw=str(span),
                    began_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    links=tuple(
                        (link.span_id.hex(), _values(link.attributes)) for link in span.links
                    ),
                )


def _metrics(body: bytes) -> Iterator[ReceivedMetric]:
    for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics:
        service = str(_values(resource.resource.attributes).get("service.name"))
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                kind = str(metric.WhichOneof("data"))
                for point in getattr(metric, kind).data_points:
                    value = point.count if kind == "histogram" else point.as_double or point.as_int
                    about = _values(point.attributes)
                    yield ReceivedMetric(metric.name, metric.unit, kind, service, about, value)


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}
