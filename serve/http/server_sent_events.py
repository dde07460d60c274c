"""A text/event-stream (WHATWG HTML, section 9.2): a job's events, or what a door makes of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.responses import StreamingResponse

from serve.errors import KelvinError
from serve.requests import JobEvent

_log = logging.getLogger("ray.serve")

# Shorter than the idle time after which common proxies drop a connection.
HEARTBEAT_S = 15.0


def event_response(
    first: JobEvent,
    rest: AsyncIterator[JobEvent],
    may_hear: Callable[[], Awaitable[bool]],
    heartbeat_s: float = HEARTBEAT_S,
) -> StreamingResponse:
    """Return a response that sends each event of a job as it comes.

    Args:
        first: An event already taken, so that an unknown job could be answered otherwise.
        rest: The others; closed when the client goes.
        may_hear: As for `stream_response`.
        heartbeat_s: A comment is sent after this many silent seconds.
    """

    async def told() -> AsyncIterator[str]:
        yield _line(first)
        try:
            async for event in rest:
                yield _line(event)
        except KelvinError as error:
            # Its status comes too late here; who asks again, as clients do, is told.
            _log.info("The events of job %s end early: %s", first.id, error)

    return stream_response(told(), may_hear, heartbeat_s)


def stream_response(
    messages: AsyncIterator[str],
    may_hear: Callable[[], Awaitable[bool]],
    heartbeat_s: float = HEARTBEAT_S,
) -> StreamingResponse:
    """Return a response that sends each message, from `message`, as it comes.

    Args:
        messages: Cancelled when the client goes.
        may_hear: Asked before each message; the stream ends where it says no: a job may take
            hours, and its follower's key be revoked.
        heartbeat_s: A comment is sent after this many silent seconds.
    """
    return StreamingResponse(
        _with_heartbeats(messages, may_hear, heartbeat_s),
        media_type="text/event-stream",
        # nginx collects answers before passing them on unless told not to.
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def message(event: str, data: str) -> str:
    """Return one message of a stream; `data` is without line breaks, as JSON is."""
    return f"event: {event}\ndata: {data}\n\n"


async def _with_heartbeats(
    messages: AsyncIterator[str], may_hear: Callable[[], Awaitable[bool]], heartbeat_s: float
) -> AsyncIterator[str]:
    pending: asyncio.Task[str | None] | None = None
    try:
        while True:
            pending = asyncio.create_task(_next(messages))
            while not (await asyncio.wait({pending}, timeout=heartbeat_s))[0]:
                if not await may_hear():
                    return
                yield ": heartbeat\n\n"
            text = pending.result()
            if text is None or not await may_hear():
                return
            yield text
    finally:
        if pending is not None:
            pending.cancel()


async def _next(messages: AsyncIterator[str]) -> str | None:
    return await anext(messages, None)


def _line(event: JobEvent) -> str:
    return message(event.event, event.model_dump_json(exclude_none=True))
