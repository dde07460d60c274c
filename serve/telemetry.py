"""Traces: one a request, through every stage, over OTLP; off until an endpoint is set.

Ray Serve makes the spans between processes and carries their context along; it asks
`span_processors` where spans go, by import path, in each process. Spans of our own hang below
Serve's. Where nothing is configured, OpenTelemetry's own no-op tracer answers and nothing is sent.

Names follow OpenTelemetry's conventions for generative AI (span `generate_content {model}`,
`gen_ai.*`); what has no name there, such as steps and guidance, is `kelvin.*`. Prompts are never
recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode

from serve.config import Settings
from serve.errors import KelvinError
from serve.metrics import Metrics
from serve.requests import GenerateRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

__all__ = ["Metrics", "environment", "generate_span", "mark_failed", "span", "span_processors"]

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_SEND_EVERY_MS = 1000  # a replica that is stopped loses at most this much
_SEND_TIMEOUT_S = 5.0

Attribute = str | bool | int | float


def environment(settings: Settings) -> dict[str, str]:
    """Return what must be in the environment of every process before Ray starts.

    Empty when tracing is off. Ray Serve reads the variables once, on import.
    """
    telemetry = settings.telemetry
    if telemetry.otlp_endpoint is None:
        return {}
    return {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serve.telemetry:span_processors",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": str(telemetry.sampling_ratio),
        "OTEL_SERVICE_NAME": telemetry.service_name,
        _ENDPOINT: telemetry.otlp_endpoint.rstrip("/"),
    }


def span_processors() -> list[SpanProcessor]:
    """Return where spans go; Ray Serve calls this in each of its processes.

    A collector that is down costs a request nothing: spans are sent by a thread, in batches.
    """
    if not os.environ.get(_ENDPOINT):
        return []
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from serve.trace_redaction import WithoutKeys

    exporter = WithoutKeys(OTLPSpanExporter(timeout=_SEND_TIMEOUT_S))
    return [BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_EVERY_MS)]


@contextmanager
def span(name: str, **attributes: Attribute | None) -> Iterator[Span]:
    """Run a block as a span below the current one, here or in another process.

    Args:
        name: For a stage `kelvin.text`, `kelvin.encode`, `kelvin.denoise`, `kelvin.decode` or
            `kelvin.store`.
        attributes: With their full names, such as `kelvin.image`; None is left out.
    """
    with _span(name, attributes) as current:
        yield current


@contextmanager
def generate_span(job_id: str, request: GenerateRequest) -> Iterator[Span]:
    """Run a block as the span of one whole request.

    Args:
        job_id: The job.
        request: Resolved, so that the attributes say what was really done.
    """
    model = request.model or "default"
    attributes: dict[str, Attribute | None] = {
        "gen_ai.operation.name": "generate_content",
        "gen_ai.provider.name": "kelvin",
        "gen_ai.output.type": "image",
        "gen_ai.request.model": model,
        "gen_ai.request.seed": None if request.seed is None else _signed(request.seed),
        "gen_ai.request.choice.count": request.num_images,
        "gen_ai.response.id": job_id,
        "kelvin.job.id": job_id,
        "kelvin.width": request.width,
        "kelvin.height": request.height,
        "kelvin.num_inference_steps": request.num_inference_steps,
        "kelvin.guidance_scale": request.guidance_scale,
        "kelvin.strength": request.strength,
        "kelvin.sampler": request.sampler,
        "kelvin.scheduler": request.scheduler,
        "kelvin.output_format": request.output_format,
        "kelvin.priority": request.priority,
        "kelvin.deadline_s": request.deadline_s,
    }
    with _span(f"generate_content {model}", attributes) as current:
        yield current


@contextmanager
def _span(name: str, attributes: Mapping[str, Attribute | None]) -> Iterator[Span]:
    tracer = trace.get_tracer("kelvin")
    known = {key: value for key, value in attributes.items() if value is not None}
    # The exception itself is not recorded: its text may quote what a caller sent.
    with tracer.start_as_current_span(
        name, attributes=known, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except BaseException as error:
            mark_failed(current, error)
            raise


def mark_failed(span: Span, error: BaseException) -> None:
    """Mark a span as failed, by the error's code or class and never by its text."""
    kind = error.code if isinstance(error, KelvinError) else type(error).__name__
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


def _signed(seed: int) -> int:
    """Return a seed as the signed 64-bit integer that OTLP can carry."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
