"""Sends a process's spans by OTLP, where an endpoint is set."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from opentelemetry import trace

from serve.otlp_complaints import quieten
from serve.recorders import OTLP_ENDPOINT

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_SEND_TIMEOUT_S = 5.0

_log = logging.getLogger("ray.serve")


def trace_this_process() -> None:
    """Make real spans in this process from now on, and send them; nothing without an endpoint.

    Replicas and proxies call it as they start. A process that traces already goes on as it does:
    OpenTelemetry knows one provider in each. Sampler and service name are in OpenTelemetry's own
    variables (`serve.telemetry.environment`).
    """
    if not os.environ.get(OTLP_ENDPOINT):
        return
    try:
        from opentelemetry.sdk.trace import TracerProvider

        if isinstance(trace.get_tracer_provider(), TracerProvider):
            return
        provider = TracerProvider()
        for processor in span_processors():
            provider.add_span_processor(processor)
        trace.set_tracer_provider(provider)
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
