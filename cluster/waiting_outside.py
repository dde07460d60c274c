"""What this process has sent to a pool and no replica has got yet.

A pool without replicas tells nothing, so what already waits for its first one is known here alone:
without it such a pool would look free to every request, and all of them would be sent there. The
Pipeline notes what it sends; the router takes out what it gives to a replica.
"""

from __future__ import annotations

import threading

# A pool that once had no replica for long may have some the next time.
_FORGOTTEN_S = 900.0


class WaitingOutside:
    """Work by a key that Pipeline and router both know; thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: dict[int, float] = {}
        self._since: float | None = None  # something waited, and no replica came
        self._last = float("-inf")
        self._emptied_at = float("-inf")

    def came(self, key: int, cool_s: float, now: float) -> None:
        """Note that work waits.

        Args:
            key: Of this piece, unique while it waits.
            cool_s: That it takes.
            now: Seconds.
        """
        with self._guard:
            if self._since is None or now - self._last > _FORGOTTEN_S:
                self._since = now
            self._last = now
            self._waiting[key] = cool_s

    def went(self, key: int) -> None:
        """Note that a replica has got it, or that it was given up."""
        with self._guard:
            self._waiting.pop(key, None)

    def replica_came(self) -> None:
        """Note that the pool has a replica."""
        self._since = None

    def replicas_went(self, now: float) -> None:
        """Note that the pool has lost its last replica; whoever is sent there now knows that."""
        self._since = None
        self._emptied_at = now

    def has_lost(self, since: float) -> bool:
        """Return whether the pool has lost its last replica after a time."""
        return self._emptied_at > since

    @property
    def cool_s(self) -> float:
        """Of all that waits."""
        with self._guard:
            return sum(self._waiting.values())

    def waited_s(self, now: float) -> float:
        """Return for how long some work has been sent here and no replica come."""
        since = self._since
        return 0.0 if since is None or now - self._last > _FORGOTTEN_S else now - since
