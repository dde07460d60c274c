"""Sends a process's spans by OTLP, where an endpoint is set."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import WeakSet

from opentelemetry import trace

from serve.otlp_complaints import quieten
from serve.recorders import OTLP_ENDPOINT

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_SEND_TIMEOUT_S = 5.0
_ours: WeakSet[trace.TracerProvider] = WeakSet()

_log = logging.getLogger("ray.serve")


def trace_this_process(place: Mapping[str, str]) -> None:
    """Make real spans in this process from now on, and send them; nothing without an endpoint.

    Replicas and proxies call it as they start. Sampler and service name are in OpenTelemetry's own
    variables (`serve.telemetry.environment`). A process that traces already, for Ray Serve was told
    to, sends by its own ways as well: OpenTelemetry has one provider in each.

    Args:
        place: Which process of Serve's this is, in OpenTelemetry's terms (`recorders.place`).
    """
    if not os.environ.get(OTLP_ENDPOINT):
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        provider = trace.get_tracer_provider()
        if provider in _ours:
            return
        if not isinstance(provider, TracerProvider):
            provider = TracerProvider(resource=Resource.create(dict(place)))
            trace.set_tracer_provider(provider)
        _ours.add(provider)
        for processor in span_processors():
            provider.add_span_processor(processor)
    except Exception:
        # OpenTelemetry's other variables are read here; a process starts without its spans as well.
        _log.exception("Spans cannot be sent.")


def span_processors() -> list[SpanProcessor]:
    """Return where spans go.

    A collector that is down costs a request nothing: spans are sent by a thread, in batches, and
    dropped when more wait than it holds. How often and how many is OpenTelemetry's own default, or
    what its variables `OTEL_BSP_*` say: every five seconds, for a sending takes some 4 ms of
    processor time in each of a service's processes. What is killed loses what it had not sent.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from serve.trace_redaction import WithoutKeys

    quieten()
    return [BatchSpanProcessor(WithoutKeys(OTLPSpanExporter(timeout=_SEND_TIMEOUT_S)))]
