"""Websockets of ComfyUI's clients in this process, and what is sent to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections import defaultdict
from enum import Enum
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect

_MOST_WAITING = 1000
_MOST_BYTES_WAITING = 8 << 20  # of text, and of pictures; one picture alone may be larger
_READS_WITHIN_S = 30.0
_MOST_HEARD = 64 << 10  # characters or bytes; the server in front takes 16 MiB
# RFC 6455's registry
_TOO_SLOW = 1013  # "try again later"
_TOO_BIG = 1009
# Each way through Serve's proxy costs 2 ms of processor time; nobody sees progress more often.
_GATHERED_FOR_S = 0.1
_MOST_GATHERED = 100  # before what waits for more fills the room of who reads too slowly
_PREVIEW = 1
_JPEG: Final = 1
_PNG: Final = 2


class _Newest(Enum):
    """Stands among what waits for whatever is the newest of its kind when its turn comes."""

    PREVIEW = "preview"


class Socket:
    """One client's websocket; messages wait until it takes them."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[str | bytes | _Newest | None] = asyncio.Queue()
        self._bytes_waiting: dict[type, int] = {str: 0, bytes: 0}
        self._preview: bytes | None = None
        self._is_given_up = False
        self._in_haste = asyncio.Event()
        self._has_sent = asyncio.Event()

    def send(self, event: str, data: dict[str, Any]) -> None:
        """Send a message: `{"type": ..., "data": ...}`; all but a prompt's end wait for more."""
        self._put(json.dumps({"type": event, "data": data}))
        if event == "executing" and data["node"] is None:
            self._in_haste.set()

    def send_preview(self, picture: bytes) -> None:
        """Send a JPEG of how far the work is; of those that still wait the newest one is sent."""
        if self._is_given_up:
            return
        if self._preview is None:
            self._waiting.put_nowait(_Newest.PREVIEW)
        self._preview = _framed(_JPEG, picture)

    async def send_picture(self, picture: bytes) -> None:
        """Send a PNG, once there is room for it.

        Who reads nothing for half a minute is let go.
        """
        frame = _framed(_PNG, picture)
        try:
            async with asyncio.timeout(_READS_WITHIN_S):
                while not self._has_room(frame):
                    self._in_haste.set()
                    self._has_sent.clear()
                    await self._has_sent.wait()
        except TimeoutError:
            self._give_up()
        self._put(frame)

    async def serve(self, websocket: WebSocket) -> None:
        """Send what comes until the client goes, or does not read any more."""
        sending = asyncio.create_task(self._send_until_gone(websocket))
        listening = asyncio.create_task(_listen(websocket))
        try:
            done, _ = await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._give_up()
            for task in (sending, listening):
                task.cancel()
            await asyncio.wait({sending, listening})
        code = next(filter(None, (task.result() for task in done)), None)
        if code is not None:
            with contextlib.suppress(WebSocketDisconnect):
                await websocket.close(code)

    def _put(self, message: str | bytes) -> None:
        if self._waiting.qsize() > _MOST_WAITING or not self._has_room(message):
            self._give_up()
        if not self._is_given_up:
            self._bytes_waiting[type(message)] += len(message)
            self._waiting.put_nowait(message)
        if self._waiting.qsize() >= _MOST_GATHERED:
            self._in_haste.set()

    def _has_room(self, message: str | bytes) -> bool:
        waiting = self._bytes_waiting[type(message)]
        return not waiting or waiting + len(message) <= _MOST_BYTES_WAITING

    def _give_up(self) -> None:
        """Keep nothing more; who comes back learns from /history what it missed."""
        if self._is_given_up:
            return
        self._is_given_up = True
        self._preview = None
        self._bytes_waiting = {str: 0, bytes: 0}
        while not self._waiting.empty():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)
        self._in_haste.set()
        self._has_sent.set()

    async def _send_until_gone(self, websocket: WebSocket) -> int | None:
        """Send what comes; returns the code to close with, None: it is closed."""
        with contextlib.suppress(WebSocketDisconnect):
            await self._send_all(websocket)
            return _TOO_SLOW
        return None

    async def _send_all(self, websocket: WebSocket) -> None:
        while (message := await self._next()) is not None:
            if isinstance(message, _Newest):
                preview, self._preview = self._preview, None
                await websocket.send_bytes(preview or b"")
            elif isinstance(message, bytes):
                self._bytes_waiting[bytes] -= len(message)
                await websocket.send_bytes(message)
            else:
                self._bytes_waiting[str] -= len(message)
                await websocket.send_text(message)
            self._has_sent.set()

    async def _next(self) -> str | bytes | _Newest | None:
        """Return what is to be sent next; once all is sent, what comes waits a moment for more."""
        if not self._waiting.empty():
            return self._waiting.get_nowait()
        self._in_haste.clear()
        message = await self._waiting.get()
        # Not wait_for: cancelled just when the wait ends, Python 3.11's goes on, to a client gone.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHERED_FOR_S):
                await self._in_haste.wait()
        return message


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


async def _listen(websocket: WebSocket) -> int | None:
    """Wait until a client goes; returns the code to close with, None: it is closed."""
    # Clients announce features; nothing they say changes what is sent.
    while (message := await websocket.receive())["type"] != "websocket.disconnect":
        if len(message.get("text") or message.get("bytes") or b"") > _MOST_HEARD:
            return _TOO_BIG
    return None


def _framed(kind: int, picture: bytes) -> bytes:
    """Return a picture as ComfyUI frames it: two big-endian numbers, then the file."""
    return struct.pack(">II", _PREVIEW, kind) + picture
