"""Traces: one a request, from the client to the upload, over OTLP; off until an endpoint is set.

`serve.http.traced` takes up the client's `traceparent` in the proxy and hands it on to the
Pipeline; from there to the stages the context travels in Kelvin's own payloads. Each of these
processes sends its own spans (`serve.span_sender`). Where nothing is configured, OpenTelemetry's
own no-op tracer answers and nothing is sent.

Names follow OpenTelemetry's conventions for generative AI (span `generate_content {model}`,
`gen_ai.*`); what has no name there, such as steps and guidance, is `kelvin.*`. Prompts are never
recorded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.config import Settings
from serve.metrics import Metrics
from serve.recorders import OTLP_ENDPOINT
from serve.requests import GenerateRequest
from serve.span_block import Attribute, SpanBlock, mark_failed, tracer

__all__ = [
    "Attribute",
    "Metrics",
    "environment",
    "generate_span",
    "mark_failed",
    "past_span",
    "span",
    "traceparent",
    "traceparent_of",
    "warn_of_what_is_not_set",
]

_log = logging.getLogger("ray.serve")


def environment(settings: Settings) -> dict[str, str]:
    """Return what must be in the environment of every process before Ray starts.

    Empty when telemetry is off. All but the logs' are OpenTelemetry's own names.
    """
    telemetry = settings.telemetry
    logs = {"RAY_SERVE_LOG_ENCODING": "JSON"} if telemetry.log_format == "json" else {}
    if telemetry.otlp_endpoint is None:
        return logs
    return logs | {
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": str(telemetry.sampling_ratio),
        "OTEL_SERVICE_NAME": telemetry.service_name,
        OTLP_ENDPOINT: telemetry.otlp_endpoint.rstrip("/"),
    }


def warn_of_what_is_not_set(settings: Settings) -> None:
    """Log which of `environment`'s variables this node's Ray was started without, if any.

    In a cluster that was there first nobody else would say why no trace and no metric arrives.
    """
    wanted = environment(settings)
    missing = [name for name, value in wanted.items() if os.environ.get(name) != value]
    if missing:
        # Without the values: an endpoint may have a password.
        _log.warning(
            "Section telemetry does not do all it says: Ray on this node was started without its"
            " %s. Every node's Ray needs them (cluster/monitoring/README.md).",
            ", ".join(missing),
        )


def traceparent() -> str | None:
    """Return the current span as W3C's `traceparent`; None where none is current."""
    return traceparent_of(trace.get_current_span())


def span(
    name: str,
    attributes: Mapping[str, Attribute | None] | None = None,
    *,
    parent: str | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    is_current: bool = True,
) -> AbstractContextManager[Span]:
    """Run a block as a span below the current one, or below one of another process.

    Args:
        name: Such as `kelvin.text`; that of the replica which does it, `kelvin.text.replica`.
        attributes: With their full names, such as `kelvin.image`; None is left out.
        parent: `traceparent` of the span above; None: the current one.
        kind: Of span.
        is_current: Whether spans within the block hang below it by themselves. Not to be so in a
            generator, which may be closed in another context than it was begun in.
    """
    context = None if parent is None else _context(parent)
    return SpanBlock(name, context, kind, _known(attributes or {}), is_current=is_current)


def past_span(
    name: str,
    began_ns: int,
    ended_ns: int,
    links: Sequence[tuple[str, Mapping[str, Attribute]]],
    attributes: Mapping[str, Attribute | None],
) -> Span:
    """Return the span of something that is over and belongs to several requests.

    It hangs below the first of them, so that it is sampled as that is, and of one that was alone
    the tree is whole; links lead to them all.

    Args:
        name: Of it.
        began_ns: Unix time.
        ended_ns: Unix time.
        links: `traceparent` of each span that had a part in it, and what part.
        attributes: As of `span`.
    """
    contexts = [trace.get_current_span(_context(parent)).get_span_context() for parent, _ in links]
    span = tracer().start_span(
        name,
        context=_context(links[0][0]),
        attributes=_known(attributes),
        links=[Link(at, part) for at, (_, part) in zip(contexts, links, strict=True)],
        start_time=began_ns,
    )
    span.end(ended_ns)
    return span


def generate_span(job_id: str, request: GenerateRequest) -> AbstractContextManager[Span]:
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
    return SpanBlock(f"generate_content {model}", attributes=_known(attributes))


def _signed(seed: int) -> int:
    """Return a seed as the signed 64-bit integer that OTLP can carry."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _known(attributes: Mapping[str, Attribute | None]) -> dict[str, Attribute]:
    return {key: value for key, value in attributes.items() if value is not None}


def _context(parent: str) -> Context:
    return TraceContextTextMapPropagator().extract({"traceparent": parent}, Context())


def traceparent_of(span: Span) -> str | None:
    """Return a span as W3C's `traceparent`; None where nothing is traced."""
    at = span.get_span_context()
    if not at.is_valid:
        return None
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-{at.trace_flags:02x}"
