"""A block of code as an OpenTelemetry span, at the price of the span.

`contextlib.contextmanager` around `trace.use_span` is three generators, one in the other, and the
SDK adds a filter of warnings whenever it is asked for a tracer: together they take longer than the
span itself, of which a picture has a score. Spans themselves are `serve.lean_span`'s.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Final

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from serve.errors import KelvinError
from serve.log_ids import answer_by

if TYPE_CHECKING:
    from serve.lean_span import LeanTracer

Attribute = str | bool | int | float
_NAME: Final = "kelvin"


class SpanBlock(AbstractContextManager[Span]):
    """Begins a span with a block and ends it with that; may be entered once.

    Args:
        name: Of the span.
        context: What it hangs below; None: the current one.
        kind: Of span. A server's answers a request, whose lines in Serve's log get its ids.
        attributes: With their full names.
        is_current: Whether spans within the block hang below it by themselves.
    """

    def __init__(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Attribute] | None = None,
        *,
        is_current: bool = True,
    ) -> None:
        self._about = (name, context, kind, attributes)
        self._is_answer = kind is SpanKind.SERVER
        self._is_current = is_current
        self._token: Token[Context] | None = None

    def __enter__(self) -> Span:
        """Begin it."""
        self._span = tracer().start_span(*self._about)
        if self._is_answer:
            answer_by(self._span)
        if self._is_current:
            self._token = attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """End it, as failed where the block did."""
        if self._token is not None:
            detach(self._token)
        # The error itself is not recorded: its text may quote what a caller sent. And whoever reads
        # a generator and has enough ends it by GeneratorExit.
        if error is not None and not isinstance(error, GeneratorExit):
            mark_failed(self._span, error)
        self._span.end()


def tracer() -> trace.Tracer | LeanTracer:
    """Return Kelvin's, of whichever provider this process has by now."""
    return _tracer_of(trace.get_tracer_provider())


@functools.lru_cache(maxsize=1)
def _tracer_of(provider: trace.TracerProvider) -> trace.Tracer | LeanTracer:
    own = provider.get_tracer(_NAME)
    # Where nothing is traced the SDK is not loaded, or told not to trace (OTEL_SDK_DISABLED).
    sdk = sys.modules.get("opentelemetry.sdk.trace")
    if sdk is None or not isinstance(provider, sdk.TracerProvider):
        return own
    if isinstance(own, trace.NoOpTracer) or not hasattr(provider, "_active_span_processor"):
        return own
    from serve.lean_span import LeanTracer

    return LeanTracer(provider, own, _NAME)


def mark_failed(span: Span, error: BaseException) -> None:
    """Mark a span as failed, by the error's code or class and never by its text."""
    kind = error.code if isinstance(error, KelvinError) else type(error).__name__
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))
