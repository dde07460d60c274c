"""Websockets of ComfyUI's clients in this process, and what is sent to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections import defaultdict
from typing import Any, Final

from starlette.websockets import WebSocket

_MOST_WAITING = 1000
_MOST_BYTES_WAITING = 64 << 20  # whole pictures go this way too, and who reads slowly has them wait
_TOO_SLOW = 1013  # "try again later", RFC 6455's registry
# Each way through Serve's proxy costs 2 ms of processor time; nobody sees progress that often.
_GATHERED_FOR_S = 0.04
_CAN_WAIT = ("progress", "executing")
_PREVIEW = 1
JPEG: Final = 1
PNG: Final = 2


class Socket:
    """One client's websocket; messages wait until it takes them."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._bytes_waiting = 0
        self._is_given_up = False
        self._in_haste = asyncio.Event()

    def send(self, event: str, data: dict[str, Any]) -> None:
        """Send a message: `{"type": ..., "data": ...}`; progress may wait a moment for more."""
        self._put(json.dumps({"type": event, "data": data}))
        if event not in _CAN_WAIT or data.get("node") is None:
            self._in_haste.set()

    def send_picture(self, kind: int, picture: bytes) -> None:
        """Send a picture as ComfyUI frames it: two big-endian numbers, then the file.

        Args:
            kind: JPEG or PNG.
            picture: The file.
        """
        self._put(struct.pack(">II", _PREVIEW, kind) + picture)

    async def serve(self, websocket: WebSocket) -> None:
        """Send what comes until the client goes, or does not read any more."""
        sending = asyncio.create_task(self._send_all(websocket))
        listening = asyncio.create_task(_listen(websocket))
        try:
            await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, listening):
                task.cancel()
            await asyncio.wait({sending, listening})

    def _put(self, message: str | bytes) -> None:
        if self._is_given_up:
            return
        self._bytes_waiting += len(message)
        if (
            self._waiting.qsize() > _MOST_WAITING
            # One picture alone may be larger.
            or (self._waiting.qsize() and self._bytes_waiting > _MOST_BYTES_WAITING)
        ):
            # Who comes back learns from /history what it missed.
            self._is_given_up = True
            while not self._waiting.empty():
                self._waiting.get_nowait()
            self._waiting.put_nowait(None)
            self._in_haste.set()
            return
        self._waiting.put_nowait(message)

    async def _send_all(self, websocket: WebSocket) -> None:
        while (message := await self._waiting.get()) is not None:
            self._bytes_waiting -= len(message)
            if isinstance(message, bytes):
                await websocket.send_bytes(message)
            else:
                await websocket.send_text(message)
            if self._waiting.empty():
                self._in_haste.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._in_haste.wait(), _GATHERED_FOR_S)
        await websocket.close(_TOO_SLOW)


class Sockets:
    """All websockets of this process, by tenant and client."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, str], set[Socket]] = defaultdict(set)

    def add(self, tenant: str, client: str, socket: Socket) -> None:
        """Let a socket hear what is sent to its client and its tenant."""
        self._clients[tenant, client].add(socket)

    def remove(self, tenant: str, client: str, socket: Socket) -> None:
        """Undo `add`."""
        self._clients[tenant, client].discard(socket)
        if not self._clients[tenant, client]:
            del self._clients[tenant, client]

    def of_client(self, tenant: str, client: str | None) -> tuple[Socket, ...]:
        """Return the sockets of one client."""
        return () if client is None else tuple(self._clients.get((tenant, client), ()))

    def of_tenant(self, tenant: str) -> tuple[Socket, ...]:
        """Return the sockets of all clients of a tenant."""
        return tuple(
            socket
            for (whose, _), sockets in self._clients.items()
            if whose == tenant
            for socket in sockets
        )


async def _listen(websocket: WebSocket) -> None:
    # Clients announce features; nothing they say changes what is sent.
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
