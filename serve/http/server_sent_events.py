"""A job's events as a text/event-stream (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from serve.requests import JobEvent

# Shorter than the idle time after which common proxies drop a connection.
HEARTBEAT_S = 15.0


def event_response(
    first: JobEvent, rest: AsyncIterator[JobEvent], heartbeat_s: float = HEARTBEAT_S
) -> StreamingResponse:
    """Return a response that sends each event as it comes.

    Args:
        first: An event already taken, so that an unknown job could be answered otherwise.
        rest: The others; closed when the client goes.
        heartbeat_s: A comment is sent after this many silent seconds.
    """
    return StreamingResponse(
        _lines(first, rest, heartbeat_s),
        media_type="text/event-stream",
        # nginx collects answers before passing them on unless told not to.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _lines(
    first: JobEvent, rest: AsyncIterator[JobEvent], heartbeat_s: float
) -> AsyncIterator[str]:
    yield _line(first)
    pending: asyncio.Task[JobEvent | None] | None = None
    try:
        while True:
            pending = asyncio.create_task(_next(rest))
            while not (await asyncio.wait({pending}, timeout=heartbeat_s))[0]:
                yield ": heartbeat\n\n"
            event = pending.result()
            if event is None:
                return
            yield _line(event)
    finally:
        if pending is not None:
            pending.cancel()


async def _next(events: AsyncIterator[JobEvent]) -> JobEvent | None:
    return await anext(events, None)


def _line(event: JobEvent) -> str:
    return f"event: {event.event}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"
