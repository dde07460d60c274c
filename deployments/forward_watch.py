"""Notices a forward that neither ends nor fails, from outside of the thread that is stuck in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deployments.ticket import Clock

# A forward may be the first of its kind and compile kernels, or share the card for a while.
_TIMES_EXPECTED = 20.0
_BESIDES_S = 60.0


class ForwardWatch:
    """Knows since when a forward runs, and how long it may.

    Args:
        clock: In seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running: tuple[float, float] | None = None  # since when, until when at most

    @contextmanager
    def running(self, expected_s: float) -> Iterator[None]:
        """Watch what is done within, by the engine's thread."""
        now = self._clock()
        self._running = now, now + _TIMES_EXPECTED * expected_s + _BESIDES_S
        try:
            yield
        finally:
            self._running = None

    @property
    def is_running(self) -> bool:
        """True while a forward is under way."""
        return self._running is not None

    @property
    def stuck_because(self) -> str | None:
        """Why the forward under way is taken for stuck, in words; None while it is not."""
        running = self._running  # one reading: the engine's thread writes it
        now = self._clock()
        if running is None or now <= running[1]:
            return None
        since, until = running
        return f"a forward has run for {now - since:.0f} s and may take {until - since:.0f} s"
