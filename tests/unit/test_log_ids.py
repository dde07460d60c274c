"""Serve's JSON lines carry the trace they belong to, and no key, as its own handlers write them."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from ray._common.formatters import JSONFormatter

from serve import telemetry
from serve.keys import new_key
from serve.log_ids import add_trace_ids


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What Serve's logger writes, in the form that it has in a replica."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    add_trace_ids()
    add_trace_ids()
    assert len(handler.filters) == 1
    return stream


def _last(lines: io.StringIO) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(lines.getvalue().splitlines()[-1])
    return found


def test_a_line_within_a_span_has_its_ids(lines: io.StringIO) -> None:
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("work") as span:
        logging.getLogger("ray.serve.kelvin").warning("within")
    at = span.get_span_context()
    assert _last(lines)["trace_id"] == f"{at.trace_id:032x}"
    assert _last(lines)["span_id"] == f"{at.span_id:016x}"
    logging.getLogger("ray.serve").warning("without")
    assert "trace_id" not in _last(lines)


def test_no_key_is_written(lines: io.StringIO) -> None:
    key, _ = new_key("tenant", ("generate",))
    log = logging.getLogger("ray.serve")
    log.warning("GET /k/%s/v1/jobs", key)
    assert _last(lines)["message"] == "GET /k/kelvin_***/v1/jobs"
    try:
        raise ValueError(key)
    except ValueError:
        log.exception("It failed.")
    assert "ValueError: kelvin_***" in _last(lines)["exc_text"]
    assert key not in lines.getvalue()


def test_what_serve_logs_of_a_request_has_the_ids_of_what_answered_it(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve import context

    provider = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    for number in range(1500):
        request = context._RequestContext(request_id=f"request {number}")
        token = context._serve_request_context.set(request)
        with telemetry.span("work", kind=SpanKind.SERVER) as span, telemetry.span("within"):
            pass
        context._serve_request_context.reset(token)
    log, at = logging.getLogger("ray.serve"), span.get_span_context()
    # Serve writes it afterwards, from elsewhere.
    log.info("CALL decode OK", extra={"request_id": "request 1499"})
    assert _last(lines)["trace_id"] == f"{at.trace_id:032x}"
    assert _last(lines)["span_id"] == f"{at.span_id:016x}"
    log.info("CALL decode OK", extra={"request_id": "request 600"})
    assert "trace_id" in _last(lines)
    log.info("CALL decode OK", extra={"request_id": "request 0"})  # of long ago
    assert "trace_id" not in _last(lines)
