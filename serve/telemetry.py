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
from contextlib import AbstractContextManager

from opentelemetry.trace import Span

from serve.config import Settings
from serve.metrics import Metrics
from serve.recorders import OTLP_ENDPOINT
from serve.requests import GenerateRequest
from serve.span_block import Attribute, SpanBlock, mark_failed
from serve.spans import known, past_span, span, traceparent, traceparent_of

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
    return SpanBlock(f"generate_content {model}", attributes=known(attributes))


def _signed(seed: int) -> int:
    """Return a seed as the signed 64-bit integer that OTLP can carry."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
