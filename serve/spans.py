"""Spans: a block of code as one, and W3C's `traceparent` of one. Light, for proxies load it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.span_block import Attribute, SpanBlock, tracer


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
    return SpanBlock(name, context, kind, known(attributes or {}), is_current=is_current)


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
        attributes=known(attributes),
        links=[Link(at, part) for at, (_, part) in zip(contexts, links, strict=True)],
        start_time=began_ns,
    )
    span.end(ended_ns)
    return span


def traceparent_of(span: Span) -> str | None:
    """Return a span as W3C's `traceparent`; None where nothing is traced."""
    at = span.get_span_context()
    if not at.is_valid:
        return None
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-{at.trace_flags:02x}"


def known(attributes: Mapping[str, Attribute | None]) -> dict[str, Attribute]:
    """Return those attributes that have a value."""
    return {key: value for key, value in attributes.items() if value is not None}


def _context(parent: str) -> Context:
    return TraceContextTextMapPropagator().extract({"traceparent": parent}, Context())
