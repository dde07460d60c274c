"""How much work a picture is on a pool, learnt from what the pool's replicas say of finished ones.

A replica that finished a picture tells its cool seconds. A step of one size and guidance costs the
same whatever the request, so the next picture of that size is known before it is sent. What was
never seen is not guessed here: the routing then takes the mean of what came before.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

_SMOOTHING = 0.3
_MOST_SIZES = 256


class WorkSizes:
    """Cool seconds of a step, by kind of picture. Thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._step_s: dict[Hashable, float] = {}

    def learn(self, kind: Hashable, steps: int, cool_s: float) -> None:
        """Take note of a finished picture.

        Args:
            kind: What the cost of a step depends on.
            steps: That it took.
            cool_s: Of all of them.
        """
        if steps < 1 or not cool_s > 0:
            return
        with self._guard:
            before = self._step_s.pop(kind, cool_s / steps)
            self._step_s[kind] = before + _SMOOTHING * (cool_s / steps - before)
            if len(self._step_s) > _MOST_SIZES:
                del self._step_s[next(iter(self._step_s))]  # the one not seen for longest

    def cool_s(self, kind: Hashable, steps: int) -> float | None:
        """Return the work of a picture; None: none of its kind was seen."""
        with self._guard:
            step_s = self._step_s.get(kind)
        return None if step_s is None else step_s * steps
