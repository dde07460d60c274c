"""What a line of Serve's log says beside its words: which trace it belongs to; and never a key.

Serve writes the fields of a record into its JSON lines (`telemetry.log_format`), so the two ids are
all that is to be added. Its text lines have a form of their own and leave them out.
"""

from __future__ import annotations

import logging
import traceback

from opentelemetry import trace

from serve.keys import without_keys

_SERVE = "ray.serve"


class TraceIds(logging.Filter):
    """Lets every record pass; `trace_id` and `span_id` are as OTLP has them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the ids of the current span, if there is one, and blot out keys."""
        at = trace.get_current_span().get_span_context()
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


def add_trace_ids() -> None:
    """Have all that this process logs by Serve's logger carry ids; calling it again does nothing.

    Its handlers, not itself, are asked: records of loggers below it come by them only.
    """
    for handler in logging.getLogger(_SERVE).handlers:
        if not any(isinstance(each, TraceIds) for each in handler.filters):
            handler.addFilter(TraceIds())
