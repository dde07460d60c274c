"""What a line of Serve's log says beside its words: which trace it belongs to; and never a key.

Serve writes the fields of a record into its JSON lines (`telemetry.log_format`), so the two ids are
all that is to be added. Its text lines have a form of their own and leave them out.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections import OrderedDict
from typing import Final

from opentelemetry import trace
from opentelemetry.trace import Span, SpanContext

from serve.keys import without_keys

_SERVE = "ray.serve"
_MOST_REQUESTS: Final = 1024
_of_requests: OrderedDict[str, SpanContext] = OrderedDict()


class TraceIds(logging.Filter):
    """Lets every record pass; `trace_id` and `span_id` are as OTLP has them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the ids of the current span or of the request, if there are, and blot out keys."""
        at = trace.get_current_span().get_span_context()
        if not at.is_valid:
            at = _of_requests.get(getattr(record, "request_id", ""), at)
        if at.is_valid:
            record.trace_id = f"{at.trace_id:032x}"
            record.span_id = f"{at.span_id:016x}"
        words = record.getMessage()
        clean = without_keys(words)
        if clean != words:
            record.msg, record.args = clean, None
        if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
            # Formatters take this for what they would have made themselves.
            told = "".join(traceback.format_exception(*record.exc_info))
            record.exc_text = without_keys(told.rstrip("\n"))
        return True


def answer_by(span: Span) -> None:
    """Have what Serve logs of the request that this code answers carry the ids of a span.

    Serve writes its line of access when the answer is there: after the span, and from a thread of
    its own, where no span is current. It does know its id of the request, which a client may choose
    (`X-Request-ID`): of two with the same one the later span counts.
    """
    at = span.get_span_context()
    if not at.is_valid or (serve := sys.modules.get("ray.serve.context")) is None:
        return
    request = serve._serve_request_context.get()  # as Serve's own manual has it
    if request is not None and request.request_id:
        _of_requests[request.request_id] = at
        _of_requests.move_to_end(request.request_id)
        while len(_of_requests) > _MOST_REQUESTS:
            _of_requests.popitem(last=False)


def add_trace_ids() -> None:
    """Have all that this process logs by Serve's logger carry ids; calling it again does nothing.

    Its handlers, not itself, are asked: records of loggers below it come by them only.
    """
    for handler in logging.getLogger(_SERVE).handlers:
        if not any(isinstance(each, TraceIds) for each in handler.filters):
            handler.addFilter(TraceIds())
