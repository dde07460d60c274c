"""A websocket whose client does not read: what waits for it is bounded, and it is let go."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from serve.http import comfyui_sockets
from serve.http.comfyui_sockets import Socket


class Client:
    """What starlette gives of a websocket, for a client that reads when it is told to."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.sending = asyncio.Event()
        self.heard: list[Any] = []
        self.closed: int | None = None

    async def send_text(self, text: str) -> None:
        await self._take(text)

    async def send_bytes(self, data: bytes) -> None:
        await self._take(data)

    async def close(self, code: int) -> None:
        self.closed = code

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        return {}

    async def _take(self, message: Any) -> None:
        self.sending.set()
        await self.reads.wait()
        self.heard.append(message)


async def served(client: Client, socket: Socket) -> asyncio.Task[None]:
    task = asyncio.create_task(socket.serve(client))  # type: ignore[arg-type]
    socket.send("executing", {"node": None})
    await client.sending.wait()
    return task


@pytest.mark.parametrize("sends", ["pictures", "messages"])
async def test_who_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch, sends: str):
    monkeypatch.setattr(comfyui_sockets, "_MOST_BYTES_WAITING", 10_000)
    monkeypatch.setattr(comfyui_sockets, "_READS_WITHIN_S", 0.05)
    client, socket = Client(), Socket()
    task = await served(client, socket)
    for _ in range(2_000):
        if sends == "pictures":
            await socket.send_picture(bytes(900))
        else:
            socket.send("x", {})
    client.reads.set()
    async with asyncio.timeout(10):
        await task
    assert client.closed == 1013
    assert len(client.heard) == 1  # the one that was on its way


async def test_who_reads_again_in_time_misses_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_sockets, "_MOST_BYTES_WAITING", 10_000)
    client, socket = Client(), Socket()
    task = await served(client, socket)
    for _ in range(10):
        for _ in range(10):
            await socket.send_picture(bytes(900))
        client.reads.set()
        async with asyncio.timeout(10):
            while socket._waiting.qsize():
                await asyncio.sleep(0)
        client.reads.clear()
    task.cancel()
    assert client.closed is None
    assert len(client.heard) >= 100


async def test_one_picture_may_be_larger_than_what_may_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_sockets, "_MOST_BYTES_WAITING", 10_000)
    client, socket = Client(), Socket()
    task = await served(client, socket)
    await socket.send_picture(bytes(20_000))
    socket.send("executed", {})
    client.reads.set()
    async with asyncio.timeout(10):
        while len(client.heard) < 3:
            await asyncio.sleep(0)
    task.cancel()
    assert client.closed is None


async def test_pictures_wait_for_who_reads_slowly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_sockets, "_MOST_BYTES_WAITING", 10_000)
    client, socket = Client(), Socket()
    task = await served(client, socket)

    async def pictures() -> None:
        for _ in range(100):
            await socket.send_picture(bytes(900))

    sending = asyncio.create_task(pictures())
    for _ in range(200):
        await asyncio.sleep(0)
    assert socket._waiting.qsize() == 11  # what there is room for
    client.reads.set()
    async with asyncio.timeout(10):
        await sending
        while len(client.heard) < 101:
            await asyncio.sleep(0)
    task.cancel()
    assert client.closed is None


async def test_of_the_previews_that_wait_the_newest_is_sent():
    client, socket = Client(), Socket()
    task = await served(client, socket)
    for number in range(100):
        socket.send_preview(bytes([number]))
    socket.send("executed", {})
    client.reads.set()
    async with asyncio.timeout(10):
        while len(client.heard) < 3:
            await asyncio.sleep(0)
        socket.send_preview(b"later")
        socket.send("executed", {})
        while len(client.heard) < 5:
            await asyncio.sleep(0)
    task.cancel()
    pictures = [each[8:] for each in client.heard if isinstance(each, bytes)]
    assert pictures == [bytes([99]), b"later"]


async def test_a_picture_for_who_has_gone_is_not_waited_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_sockets, "_MOST_BYTES_WAITING", 1_000)
    client, socket = Client(), Socket()
    task = await served(client, socket)
    await socket.send_picture(bytes(900))
    sending = asyncio.create_task(socket.send_picture(bytes(900)))
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(10):
        await sending


async def test_who_goes_while_something_is_sent_is_no_error():
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
    client, socket = Client(), Socket()

    async def send(text: str) -> None:
        client.sending.set()
        try:
            await client.reads.wait()
        finally:
            raise WebSocketDisconnect(1006)

    async def receive() -> dict[str, str]:
        await client.sending.wait()
        return {"type": "websocket.disconnect"}

    client.send_text = send  # type: ignore[method-assign]
    client.receive = receive  # type: ignore[method-assign]
    socket.send("status", {})
    async with asyncio.timeout(10):
        await socket.serve(client)  # type: ignore[arg-type]
    gc.collect()
    assert complaints == []


async def test_who_goes_while_a_message_waits_for_more_is_sent_nothing(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(comfyui_sockets, "_GATHERED_FOR_S", 3600.0)
    client, socket, goes = Client(), Socket(), asyncio.Event()
    client.reads.set()

    async def receive() -> dict[str, str]:
        await goes.wait()
        return {"type": "websocket.disconnect"}

    client.receive = receive  # type: ignore[method-assign]
    task = await served(client, socket)
    for _ in range(50):
        await asyncio.sleep(0)
    socket.send("progress", {"node": "5", "value": 1})
    for _ in range(50):
        await asyncio.sleep(0)
    goes.set()
    async with asyncio.timeout(10):
        await task
    assert len(client.heard) == 1  # what came before


async def test_messages_wait_for_more_and_an_end_for_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_sockets, "_GATHERED_FOR_S", 3600.0)
    client, socket = Client(), Socket()
    client.reads.set()
    task = await served(client, socket)
    socket.send("execution_start", {"node": "0"})
    socket.send("progress", {"node": "5", "value": 1})
    socket.send("executing", {"node": "6"})
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(client.heard) == 1  # the end of the prompt before
    socket.send("executing", {"node": None})
    async with asyncio.timeout(10):
        while len(client.heard) < 5:
            await asyncio.sleep(0)
    assert [json.loads(each)["data"]["node"] for each in client.heard] == [
        *(None, "0", "5", "6", None)
    ]
    task.cancel()


async def test_who_reads_at_once_hears_all_of_a_burst(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_sockets, "_GATHERED_FOR_S", 3600.0)
    client, socket = Client(), Socket()
    client.reads.set()
    task = await served(client, socket)
    while socket._waiting.qsize():
        await asyncio.sleep(0)
    # A prompt of 64 chains that is over already is told in less time than messages wait.
    for value in range(3000):
        socket.send("progress", {"node": "5", "value": value})
        await asyncio.sleep(0)
    socket.send("executing", {"node": None})
    async with asyncio.timeout(10):
        while len(client.heard) < 3002 and not task.done():
            await asyncio.sleep(0)
    assert len(client.heard) == 3002
    task.cancel()


async def test_progress_comes_by_itself_in_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_sockets, "_GATHERED_FOR_S", 0.01)
    client, socket = Client(), Socket()
    client.reads.set()
    task = await served(client, socket)
    for value in range(3):
        socket.send("progress", {"node": "5", "value": value})
    async with asyncio.timeout(10):
        while len(client.heard) < 4:
            await asyncio.sleep(0.001)
    task.cancel()
