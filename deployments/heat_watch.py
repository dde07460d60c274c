"""Reads a card over and over in a thread, so that nobody who needs a reading waits for a driver."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cluster.heat_reading import HeatSource, Reading

_log = logging.getLogger(__name__)


class HeatWatch:
    """The newest reading of one source, and how old it is.

    A source that gives nothing, raises or does not come back leaves the last reading in place: it
    ages, and whoever uses it can tell by `age_s`. Construction waits for the first answer, but no
    longer than `first_s`.

    Args:
        source: Asked by this thread alone.
        period_s: Seconds from the end of one reading to the next.
        first_s: The longest wait for the first.
        clock: The one that stamps the source's readings.
    """

    def __init__(
        self,
        source: HeatSource,
        period_s: float,
        *,
        first_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._period_s = period_s
        self._clock = clock
        self._newest: Reading | None = None
        self._problem: str | None = "not read yet"
        self._raised = False
        self._first = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heat-watch", daemon=True)
        self._thread.start()
        self._first.wait(first_s)

    @property
    def newest(self) -> Reading | None:
        """The last reading there was; None: there never was one."""
        return self._newest

    @property
    def age_s(self) -> float | None:
        """Seconds since the newest reading was taken; None: there never was one."""
        newest = self._newest
        return None if newest is None else max(self._clock() - newest.at, 0.0)

    @property
    def problem(self) -> str | None:
        """Why the last try gave no reading, in words; None if it gave one."""
        return self._problem

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop reading and wait for the thread.

        Args:
            timeout_s: The longest wait; a source that never comes back is left behind.
        """
        self._stop.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("%s does not come back; left behind", self._source.description)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._read()
            self._first.set()
            self._stop.wait(self._period_s)

    def _read(self) -> None:
        try:
            reading = self._source.read()
            problem = self._source.problem or f"{self._source.description} gave nothing"
        except Exception as error:
            # Sources promise not to; a replica must not run blind without a word if one does.
            if not self._raised:
                _log.exception("a source of readings raised")
            self._raised = True
            self._problem = f"{type(error).__name__}: {error}"
            return
        if reading is None:
            self._problem = problem
            return
        self._newest, self._problem = reading, None
