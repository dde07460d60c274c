"""Tenants share the denoisers fairly: who waits, waits here, and goes in fair order.

What is once sent to a pool is served first come, first served, so little is sent ahead: beside what
is being denoised at most as much again, which keeps batches full and cards busy. As long as nobody
but the default tenant was seen there is nothing to share, and everything is sent at once.

What waits here is not seen by autoscaling, which sees that twice as much as runs has been sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from cluster.fair_queue import FairQueue
from serve.tenant_settings import TenantSettings
from serve.tenants import DEFAULT_TENANT

# Sent ahead while nothing runs, as just after a start.
_LEAST_AHEAD = 4


class FairShare:
    """The turns of one model's pictures in one Pipeline; on one event loop.

    Args:
        settings: Weights of tenants.
    """

    def __init__(self, settings: TenantSettings) -> None:
        self._settings = settings
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._is_shared = False
        self._ahead = 0  # sent, and not begun
        self._begun = 0

    @property
    def waiting(self) -> int:
        """How many pictures wait for their turn."""
        return len(self._queue)

    @asynccontextmanager
    async def turn(
        self, tenant: str, cost_s: float, priority: int = 0
    ) -> AsyncIterator[Callable[[], None]]:
        """Wait for a picture's turn; the context is its denoising.

        Args:
            tenant: Whose it is.
            cost_s: Estimated seconds of work.
            priority: Among the tenant's own.

        Yields:
            To be called when the first step is done.
        """
        self._is_shared = self._is_shared or tenant != DEFAULT_TENANT
        if self._is_shared:
            await self._wait(tenant, cost_s, priority)
        else:
            self._ahead += 1
        has_begun = False

        def begun() -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                self._ahead -= 1
                self._begun += 1
                self._let_in()

        try:
            yield begun
        finally:
            if has_begun:
                self._begun -= 1
            else:
                self._ahead -= 1
            self._let_in()

    async def _wait(self, tenant: str, cost_s: float, priority: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        weight = self._settings.of(tenant).weight
        self._queue.push(tenant, turn, max(cost_s, 1e-3), weight, priority)
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue.discard(tenant, turn)
            else:  # its turn had come just before
                self._ahead -= 1
                self._let_in()
            raise

    def _let_in(self) -> None:
        while self._ahead < max(_LEAST_AHEAD, self._begun):
            turn = self._queue.pop()
            if turn is None:
                return
            if turn.cancelled():
                continue
            self._ahead += 1
            turn.set_result(None)
