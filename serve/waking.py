"""Wakes stages that are without replicas as soon as a request is on its way to them.

Ray Serve starts the first replica of an empty deployment when a call waits for it, and asks no
policy of a single deployment meanwhile. Without this three empty stages would start one after the
other, each when the one before has answered. So a call that costs nothing waits for a replica of
each stage from the first moment on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from cluster.pool_state import Stage

_log = logging.getLogger("ray.serve")

# A replica that has not come by then is waited for by the request itself, when it gets there.
_AT_MOST_S = 600.0


class Sleepers(Protocol):
    """Knows which stages are asleep; `serve.pool_choice.PoolChoice` is one."""

    def is_asleep(self, stage: Stage) -> bool:
        """Whether a stage has no replica, as far as is known here, and starts on demand."""

    def pool(self, stage: Stage) -> str:
        """Return the name of the stage's pool that work would be sent to."""


class Waking:
    """One call at a time that waits for each stage that sleeps.

    Args:
        pools: Stage -> pool -> its handle.
        sleepers: Who sleeps.
    """

    def __init__(
        self, pools: Mapping[Stage, Mapping[str, DeploymentHandle]], sleepers: Sleepers
    ) -> None:
        self._pools = pools
        self._sleepers = sleepers
        self._calls: dict[Stage, asyncio.Task[None]] = {}

    def wake(self, stages: Sequence[Stage]) -> None:
        """Have stages start that sleep; returns at once."""
        for stage in stages:
            if stage not in self._calls and self._sleepers.is_asleep(stage):
                handle = self._pools[stage][self._sleepers.pool(stage)]
                self._calls[stage] = asyncio.create_task(self._call(stage, handle))

    async def _call(self, stage: Stage, handle: DeploymentHandle) -> None:
        response: Any = handle.status.remote()
        try:
            async with asyncio.timeout(_AT_MOST_S):
                await response
        except Exception:
            # The request that is on its way finds the same, and says so to who waits for it.
            _log.warning("stage %r could not be woken", stage, exc_info=True)
        finally:
            response.cancel()  # nothing, where it has answered
            del self._calls[stage]
