"""What stays open for hours or days ends when the key that opened it is revoked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from serve.errors import StorageUnavailable
from serve.key_ring import REVOKED_WITHIN_S, KeyRing

_POLICY_VIOLATION = 1008


async def until_revoked(keys: KeyRing, key: str, serving: Awaitable[None], send: Any) -> None:
    """Serve a websocket until it ends, or its key is no key any more: then it is closed.

    Args:
        keys: All of them.
        key: The one that opened it.
        serving: What serves it; its errors are raised.
        send: Of its ASGI connection.
    """
    served = asyncio.ensure_future(serving)
    revoked = asyncio.create_task(_revoked(keys, key))
    try:
        await asyncio.wait({served, revoked}, return_when=asyncio.FIRST_COMPLETED)
        if served.done():
            await served
    finally:
        is_open = not served.done()
        for task in (served, revoked):
            task.cancel()
        await asyncio.wait({served, revoked})
    if is_open:
        with suppress(OSError):  # the client may have gone meanwhile
            await send(
                {"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": "key revoked"}
            )


async def still_counts(keys: KeyRing, key: str) -> bool:
    """Return False once a key is revoked."""
    # While their store does not answer, nobody can revoke through it either.
    with suppress(StorageUnavailable):
        return await keys.find(key) is not None
    return True


async def _revoked(keys: KeyRing, key: str) -> None:
    while await still_counts(keys, key):
        await asyncio.sleep(REVOKED_WITHIN_S)
