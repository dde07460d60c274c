"""A collector that is away is told of once a minute; OpenTelemetry tells with each batch."""

from __future__ import annotations

import logging
import time
from typing import Final

_BETWEEN_S: Final = 60.0
_LOGGERS: Final = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.sdk._shared_internal",
)


class OnceAMinute(logging.Filter):
    """Lets one record of its logger pass a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._last_at = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a minute has passed."""
        now = time.monotonic()
        if now < self._last_at + _BETWEEN_S:
            return False
        self._last_at = now
        return True


def quieten() -> None:
    """Have this process's senders complain once a minute; calling it again does nothing."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, OnceAMinute) for each in logger.filters):
            logger.addFilter(OnceAMinute())
