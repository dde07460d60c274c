"""Kelvin's own spans, for a third of the processor time that the SDK's take (loadtest/data/cpu).

The SDK asks its sampler, takes two locks, looks through the attributes one by one and copies the
whole span at its end, in code that has left the processor's caches since the last span; a picture
has a score of them, one after the other. None of that is needed below a span that is sampled
already and where all attributes are Kelvin's: a few, of simple types. A root is still the SDK's,
for whether it is sampled is the sampler's to say; and what sends spans is the SDK's, as ever.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
)

_BITS = 64
_UNSET = Status()


class LeanTracer:
    """Begins spans below others by itself, and roots by the SDK.

    Whether a span is sampled is whether the one above is: a sampler that decides otherwise below a
    parent (`OTEL_TRACES_SAMPLER=always_off`, instead of what Kelvin sets) is asked for roots alone.

    Args:
        provider: Whose processors get the spans.
        roots: Makes those that hang below nothing.
        name: Of the instrumentation scope.
    """

    def __init__(self, provider: TracerProvider, roots: trace.Tracer, name: str) -> None:
        self._roots = roots
        self._resource = provider.resource
        self._scope = InstrumentationScope(name, "", "")  # as the SDK makes it
        # The one that hands on to all others, also to those that come later.
        self._to = provider._active_span_processor

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[Link] = (),
        start_time: int | None = None,
    ) -> Span:
        """Begin a span.

        Args:
            name: Of it.
            context: What it hangs below; None: the current one.
            kind: Of span.
            attributes: As OTLP can carry them; they are not looked at.
            links: To other spans.
            start_time: Unix time, ns; now if absent.
        """
        parent = trace.get_current_span(context).get_span_context()
        if not parent.is_valid:
            return self._roots.start_span(name, context, kind, attributes, links, start_time)
        if not parent.trace_flags.sampled:
            return NonRecordingSpan(parent)
        number = random.getrandbits(_BITS) or 1  # 0 is none
        at = SpanContext(parent.trace_id, number, False, parent.trace_flags, parent.trace_state)
        began_ns = time.time_ns() if start_time is None else start_time
        return LeanSpan(
            self._ended, name, at, parent, kind, dict(attributes or ()), links, began_ns
        )

    def _ended(self, span: LeanSpan, ended_ns: int) -> None:
        self._to.on_end(
            ReadableSpan(
                span.name,
                span.at,
                span.parent,
                self._resource,
                span.attributes,
                span.events,
                span.links,
                span.kind,
                status=span.status,
                start_time=span.began_ns,
                end_time=ended_ns,
                instrumentation_scope=self._scope,
            )
        )


class LeanSpan(Span):
    """A span that is sampled, until it ends; what comes later is not taken.

    Args:
        ended: Is called once, with the span and the Unix time in ns.
        name: Of the span.
        at: Its own ids.
        parent: Those of the one above.
        kind: Of span.
        attributes: A dictionary of its own.
        links: To other spans.
        began_ns: Unix time.
    """

    def __init__(
        self,
        ended: Callable[[LeanSpan, int], None],
        name: str,
        at: SpanContext,
        parent: SpanContext,
        kind: SpanKind,
        attributes: dict[str, Any],
        links: Sequence[Link],
        began_ns: int,
    ) -> None:
        self.name = name
        self.at = at
        self.parent = parent
        self.kind = kind
        self.attributes = attributes
        self.links = links
        self.began_ns = began_ns
        self.events: tuple[Event, ...] = ()
        self.status = _UNSET
        self._tell: Callable[[LeanSpan, int], None] | None = ended

    def end(self, end_time: int | None = None) -> None:
        """End it, now if no time is given; the second time nothing happens."""
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(self, time.time_ns() if end_time is None else end_time)

    def is_recording(self) -> bool:
        """Whether it has not ended."""
        return self._tell is not None

    def get_span_context(self) -> SpanContext:
        """Return its ids."""
        return self.at

    def set_attribute(self, key: str, value: Any) -> None:
        """Set one."""
        if self.is_recording():
            self.attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set several."""
        if self.is_recording():
            self.attributes.update(attributes)

    def add_event(
        self,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        timestamp: int | None = None,
    ) -> None:
        """Add what happened, at a Unix time in ns; now if that is absent."""
        if self.is_recording():
            self.events += (Event(name, attributes, timestamp),)

    def add_link(self, context: SpanContext, attributes: Mapping[str, Any] | None = None) -> None:
        """Add a link to another span."""
        if self.is_recording():
            self.links = (*self.links, Link(context, attributes))

    def update_name(self, name: str) -> None:
        """Call it otherwise."""
        if self.is_recording():
            self.name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Set how it went."""
        if self.is_recording():
            self.status = status if isinstance(status, Status) else Status(status, description)

    def record_exception(
        self,
        exception: BaseException,
        attributes: Mapping[str, Any] | None = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add an error's class, as an event; its text may quote what a caller sent."""
        about = {**(attributes or {}), "exception.type": type(exception).__name__}
        self.add_event("exception", about, timestamp)
