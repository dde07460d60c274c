"""Spans leave without API keys: libraries write paths and headers of requests into theirs.

A key in a path is one of a client that can set no header (`/k/{key}/...`); it is blotted out just
before a span is sent, whoever made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Status

from serve.keys import has_key, without_keys


class WithoutKeys(SpanExporter):
    """Sends spans on by another exporter.

    Args:
        exporter: That one.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        return self._exporter.export([_clean(span) if _has_key(span) else span for span in spans])

    def shutdown(self) -> None:
        """End."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits."""
        return self._exporter.force_flush(timeout_millis)


def _has_key(span: ReadableSpan) -> bool:
    values = [span.name, span.status.description, *(span.attributes or {}).values()]
    for event in span.events:
        values += event.attributes.values() if event.attributes else ()
    return any(map(_holds_key, values))


def _holds_key(value: Any) -> bool:
    if isinstance(value, str):
        return has_key(value)
    return isinstance(value, tuple) and any(map(_holds_key, value))


def _clean(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=without_keys(span.name),
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=_cleaned(span.attributes),
        events=[
            Event(event.name, _cleaned(event.attributes), event.timestamp) for event in span.events
        ],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code, _without_keys(span.status.description)),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _cleaned(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: _without_keys(value) for name, value in (attributes or {}).items()}


def _without_keys(value: Any) -> Any:
    if isinstance(value, str):
        return without_keys(value)
    # An attribute may be a sequence, as headers are.
    return tuple(map(_without_keys, value)) if isinstance(value, tuple) else value
