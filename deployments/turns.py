"""Who works together in a replica, and who works alone.

A piece of work during which a replica died is run again alone: if the replica dies once more, it
was to blame, and if not, nobody else's death is put down to it. Who waits to be alone lets those
who work finish, and those who come later wait. All on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager


class Turns:
    """Hands out turns of two kinds: together with others, and alone."""

    def __init__(self) -> None:
        self._together = 0
        self._is_one_alone = False
        self._wait_to_be_alone = 0
        self._changed = asyncio.Event()

    def turn(self, *, alone: bool) -> AbstractAsyncContextManager[None]:
        """Return a context in which it is one's turn."""
        return self._alone() if alone else self._with_others()

    @asynccontextmanager
    async def _with_others(self) -> AsyncIterator[None]:
        await self._until(lambda: not self._is_one_alone and not self._wait_to_be_alone)
        self._together += 1
        try:
            yield
        finally:
            self._together -= 1
            self._tell()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        self._wait_to_be_alone += 1
        try:
            await self._until(lambda: not self._is_one_alone and not self._together)
            self._is_one_alone = True
        finally:
            self._wait_to_be_alone -= 1
            self._tell()
        try:
            yield
        finally:
            self._is_one_alone = False
            self._tell()

    async def _until(self, is_ones_turn: Callable[[], bool]) -> None:
        while not is_ones_turn():
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
