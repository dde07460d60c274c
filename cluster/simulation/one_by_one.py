"""A text or decode replica: one request at a time, each the same number of seconds."""

from __future__ import annotations

from collections import deque

from cluster.simulation.traffic import Request


class OneByOne:
    """One replica; the attributes are those of `Denoiser`."""

    __slots__ = (
        "_ends_at",
        "_held",
        "_seconds",
        "accepted",
        "accepted_s",
        "card",
        "id",
        "ongoing",
        "speed",
        "version",
    )

    def __init__(self, id: str, seconds: float) -> None:
        self.id = id
        self.card = -1
        self._seconds = seconds
        self._held: deque[Request] = deque()
        self._ends_at = 0.0
        self.accepted = 0
        self.accepted_s = 0.0
        self.ongoing = 0
        self.speed = 1.0
        self.version = 0

    @property
    def holds(self) -> frozenset[str]:
        """Nothing that another request could join."""
        return frozenset()

    def own_s(self, request: Request) -> float:
        """Return the seconds that a request takes here alone."""
        return self._seconds

    def accept(self, request: Request, now: float) -> float | None:
        """Take a request; return when the next one ends, if that was not known."""
        self._held.append(request)
        self.ongoing += 1
        self.accepted += 1
        self.accepted_s += self._seconds
        return self._next(now) if self.ongoing == 1 else None

    def finish_stretch(self, now: float) -> tuple[list[Request], float | None]:
        """Return the request that is done, and when the next one will be."""
        done = self._held.popleft()
        self.ongoing -= 1
        return [done], self._next(now) if self._held else None

    def backlog(self, now: float) -> tuple[float, float]:
        """Return seconds of what it has not begun, and what is left of the one it has."""
        if not self._held:
            return 0.0, 0.0
        return (self.ongoing - 1) * self._seconds, max(self._ends_at - now, 0.0)

    def _next(self, now: float) -> float:
        self.version += 1
        self._ends_at = now + self._seconds
        return self._ends_at
