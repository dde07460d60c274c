"""How long the host takes to launch forwards: whatever compiles inside one shows here."""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import Tensor

from deployments.sd3.mmdit import Mmdit

_SLOW_MS = 100.0


class LaunchTimes:
    """A model that times its own launches; in all else the model it was made of.

    Args:
        mmdit: The model.
    """

    def __init__(self, mmdit: Mmdit) -> None:
        self._mmdit = mmdit
        self._took_ms: dict[tuple[int, ...], list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mmdit, name)

    def velocity(self, *inputs: Any) -> Tensor:
        """Predict as the model does; shapes as of `Mmdit.velocity`."""
        began = time.perf_counter()
        velocity = self._mmdit.velocity(*inputs)
        took = 1000 * (time.perf_counter() - began)
        self._took_ms.setdefault(tuple(inputs[0].shape), []).append(took)
        return velocity

    def clear(self) -> None:
        """Forget what was timed."""
        self._took_ms.clear()

    def summary(self) -> dict[str, Any]:
        """Return the median, the slowest, and shapes whose first launch was slow, milliseconds."""
        every = [took for each in self._took_ms.values() for took in each]
        slow = {
            "x".join(map(str, shape)): each[0]
            for shape, each in self._took_ms.items()
            if each[0] > _SLOW_MS
        }
        return {
            "n": len(every),
            "shapes": len(self._took_ms),
            "median_ms": statistics.median(every) if every else None,
            "slowest_ms": max(every, default=None),
            "slow_first_launches_ms": slow,
        }
