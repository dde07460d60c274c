"""Waiting for a call's first answer, as long as the pool that it went to may have a replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import Any, TypeVar

from deployments.payloads import DenoiseEvent
from serve.errors import StageUnavailable

_Result = TypeVar("_Result")

_LOOK_AGAIN_S = 1.0


class WaitedInVain(StageUnavailable):
    """A pool has no replica, and another one of its stage may have."""


async def answer_of(response: Any, is_vain: Callable[[float], bool]) -> Any:
    """Wait for a call, and ask about once a second whether that is vain by now.

    Raises:
        WaitedInVain: It is.
    """
    try:
        return await _unless_vain(response, is_vain)
    except (asyncio.CancelledError, StageUnavailable):
        response.cancel()
        raise


async def items_of(
    stream: Any, is_vain: Callable[[float], bool]
) -> AsyncIterator[tuple[DenoiseEvent, ...]]:
    """Yield items; while none has come, as `answer_of` waits."""
    items = aiter(stream)
    try:
        yield await _unless_vain(anext(items), is_vain)
    except StopAsyncIteration:
        return
    async for item in items:
        yield item


async def _unless_vain(awaited: Awaitable[_Result], is_vain: Callable[[float], bool]) -> _Result:
    began = monotonic()
    task = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_AGAIN_S))[0]:
            if is_vain(monotonic() - began):
                raise WaitedInVain("The pool has no replica, and another one may have.")
        return task.result()
    finally:
        if not task.done():
            # Ends with an error of Ray's, which asyncio would write into the log as nobody's.
            task.add_done_callback(_take_note)
            task.cancel()


def _take_note(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
