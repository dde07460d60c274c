"""Waiting for what comes about by itself, with a deadline."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def until(condition: Callable[[], Any], within_s: float = 30.0) -> Any:
    """Return what a condition, plain or async, gives once it counts as true.

    Raises:
        TimeoutError: It does not.
    """
    async with asyncio.timeout(within_s):
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.02)
