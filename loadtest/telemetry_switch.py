"""Turns telemetry off and on in a service that runs, for `loadtest.telemetry_overhead` alone.

Two services differ from start to start by more than telemetry costs, so off and on are measured in
the same processes. Nothing in Kelvin knows of it: Ray Serve asks by import paths in the environment
for span processors, which Kelvin has no use for, and for what stands in front of its proxies. This
module is named as both, and so comes first in every process. It hands on what is Kelvin's and makes
all that telemetry does depend on one byte of a file that every process has mapped:

- off, roots are OpenTelemetry's no-op spans, which are what a service without telemetry has, and so
  is all beneath them, for clients here send no `traceparent`; values of metrics are not noted for
  OTLP;
- what was recorded while it was on is counted and sent only while it is on again, so that no part
  of the cost falls on the other side.

A service that never had telemetry lacks two idle threads a process; nothing else is known to
differ.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import NoOpTracer, Span, Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import SpanExportResult
    from starlette.middleware import Middleware

ENVIRONMENT: Final = {
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "loadtest.telemetry_switch:span_processors",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "loadtest.telemetry_switch:middlewares",
}
FILE: Final = "KELVIN_LOADTEST_TELEMETRY_SWITCH"
"""Environment variable: the file of one byte."""


class Switch:
    """On or off, the same in all processes that map its file; true where it is on.

    Args:
        path: A file of one byte.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def turn(self, *, on: bool) -> None:
        """Turn it, at once and everywhere."""
        self._byte[0] = int(on)

    def __bool__(self) -> bool:
        return self._byte[0] != 0


def new_switch(path: Path) -> Switch:
    """Make the file of one and map it; it is on."""
    path.write_bytes(b"\x01")
    return Switch(path)


def middlewares() -> list[Middleware]:
    """Return Kelvin's; Ray Serve calls this in each of its proxies, before `span_processors`."""
    from serve.http import proxy_headers

    _put_under_the_switch()
    return proxy_headers.middlewares()


def span_processors() -> list[SpanProcessor]:
    """Return none: Ray Serve calls this in each of its processes; Kelvin brings its own."""
    _put_under_the_switch()
    return []


@functools.cache
def _put_under_the_switch() -> None:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk import trace
    from ray.serve._private import tracing_utils

    from serve.otlp_recorder import OtlpRecorder
    from serve.trace_redaction import WithoutKeys

    switch = Switch(Path(os.environ[FILE]))

    class SwitchedProvider(trace.TracerProvider):
        def get_tracer(self, *about: Any, **more: Any) -> Tracer:
            # Serve, asked for a provider, would trace by itself from now on; Kelvin does not ask.
            tracing_utils._tracing_enabled = False
            return SwitchedTracer(switch, super().get_tracer(*about, **more))

    # In a proxy Kelvin makes the provider, in a replica Serve.
    for module in (trace, tracing_utils):
        setattr(module, "TracerProvider", SwitchedProvider)  # noqa: B010 - another type
    for owner, name, under in (
        (WithoutKeys, "export", held_while_off),
        (OTLPMetricExporter, "export", _not_sent_while_off),
        (OtlpRecorder, "record", _nothing_while_off),
        (OtlpRecorder, "_count_waiting", _nothing_while_off),
    ):
        setattr(owner, name, under(switch, getattr(owner, name)))


class SwitchedTracer(Tracer):
    """The SDK's tracer while the switch is on, and the no-op one while it is off.

    Args:
        switch: That one.
        real: The SDK's.
    """

    def __init__(self, switch: Switch, real: Tracer) -> None:
        self._switch = switch
        self._real = real
        self._none = NoOpTracer()

    def start_span(self, *about: Any, **more: Any) -> Span:
        """Begin a span by whichever it is now."""
        return (self._real if self._switch else self._none).start_span(*about, **more)

    def start_as_current_span(self, *about: Any, **more: Any) -> Any:
        """As `start_span`, current within a block."""
        return (self._real if self._switch else self._none).start_as_current_span(*about, **more)


def _nothing_while_off(switch: Switch, method: Callable[..., None]) -> Callable[..., None]:
    def switched(*about: Any, **more: Any) -> None:
        if switch:
            method(*about, **more)

    return switched


def _not_sent_while_off(switch: Switch, export: Callable[..., Any]) -> Callable[..., Any]:
    from opentelemetry.sdk.metrics.export import MetricExportResult

    def switched(*about: Any, **more: Any) -> Any:
        # They are sums, of which the next message has all.
        return export(*about, **more) if switch else MetricExportResult.SUCCESS

    return switched


def held_while_off(
    switch: Switch, export: Callable[[Any, Sequence[ReadableSpan]], SpanExportResult]
) -> Callable[[Any, Sequence[ReadableSpan]], SpanExportResult]:
    """Return a method that keeps spans while it is off and sends them when it is on again.

    Args:
        switch: That decides.
        export: Method of an exporter, which sends.
    """
    from opentelemetry.sdk.trace.export import SpanExportResult

    held: list[ReadableSpan] = []  # touched by the one thread that sends

    def switched(exporter: Any, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        held.extend(spans)
        if not switch:
            return SpanExportResult.SUCCESS
        sent = list(held)
        held.clear()
        return export(exporter, sent)

    return switched
