"""A rate limit that says truthfully when to come again."""

from __future__ import annotations


class TokenBucket:
    """Tokens that come evenly and are saved up so far; full to begin with. It has no clock.

    Args:
        rate: Tokens a second, above 0.
        capacity: That are saved up, above 0.
        now: Seconds.
    """

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self._rate = rate
        self._capacity = capacity
        self._tokens = capacity
        self._at = now

    def take(self, tokens: float, now: float) -> float | None:
        """Take tokens if there are enough.

        Args:
            tokens: At most the capacity.
            now: Seconds, not before the last call's.

        Returns:
            None: taken; else the seconds after which there will be enough, if nobody takes any.
        """
        self._tokens = min(self._capacity, self._tokens + self._rate * max(0.0, now - self._at))
        self._at = max(self._at, now)
        # A hair's breadth for sums of floats: who waits as long as told is let in.
        missing = tokens - self._tokens
        if missing > 1e-6 * max(1.0, tokens):
            return missing / self._rate
        self._tokens -= tokens
        return None

    def give_back(self, tokens: float) -> None:
        """Return tokens that were taken for nothing."""
        self._tokens = min(self._capacity, self._tokens + tokens)
