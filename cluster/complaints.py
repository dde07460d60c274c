"""Failures that come back with every tick, told now and then: a traceback a second drowns a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_BETWEEN_S = 60.0


class Complaints:
    """Logs exceptions, not more than one a minute.

    Args:
        log: Where to.
        clock: Seconds, never going back.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._last_at = float("-inf")

    def about(self, error: Exception, words: str) -> None:
        """Log an exception with its traceback, unless another was within the last minute.

        Args:
            error: What was raised.
            words: What follows from it.
        """
        now = self._clock()
        if now >= self._last_at + _BETWEEN_S:
            self._last_at = now
            self._log.error(words, exc_info=error)
