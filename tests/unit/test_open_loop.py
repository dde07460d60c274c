"""The load generator: nobody waits for another's answer, and what is late shows."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loadtest.open_loop import NO_ANSWER, Door, poisson
from loadtest.process_census import Process, processes

PICTURE = json.dumps({"seconds": 0.3}).encode()
REFUSED = json.dumps({"error": {"code": "overloaded"}}).encode()


class Server:
    """Answers after a pause: every second request with a picture, in chunks; others not."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s
        self.connections = self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.requests += 1
                await asyncio.sleep(self.pause_s)
                if body["number"] % 2:
                    writer.write(
                        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\n"
                        + b"Content-Length: %d\r\n\r\n%s" % (len(REFUSED), REFUSED)
                    )
                else:
                    half = len(PICTURE) // 2
                    chunks = b"".join(
                        b"%x\r\n%s\r\n" % (len(part), part)
                        for part in (PICTURE[:half], PICTURE[half:], b"")
                    )
                    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def door(server: Server) -> AsyncIterator[Door]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with listening, Door(f"http://127.0.0.1:{port}", time.monotonic()) as opened:
        yield opened


async def test_requests_are_sent_when_due_whatever_becomes_of_those_before():
    server = Server(pause_s=0.5)
    async with door(server) as opened:
        begin = opened.now
        answers = await opened.offer([0.01 * n for n in range(20)], lambda n: {"number": n})
        assert opened.now - begin < 10 * 0.5, "one after the other it is twenty times the pause"
    assert [each.status for each in answers] == [200, 429] * 10
    made, refused = answers[0], answers[1]
    assert (made.job_s, made.is_refused) == (0.3, False)
    assert (refused.code, refused.retry_after_s, refused.is_refused) == ("overloaded", 7.0, True)
    assert all(each.seconds >= 0.5 for each in answers)
    assert [each.at for each in answers] == [0.01 * n for n in range(20)]


async def test_a_generator_that_lags_shows_in_latencies():
    async with door(Server(pause_s=0.0)) as opened:
        late = await opened.ask({"number": 0}, at=opened.now - 3.0)
    assert late.late_s >= 3.0
    assert late.seconds >= late.late_s


async def test_connections_are_used_again_and_lost_ones_are_told():
    server = Server(pause_s=0.0)
    async with door(server) as opened:
        for number in range(5):
            await opened.ask({"number": number})
    assert (server.connections, server.requests) == (1, 5)
    async with Door("http://127.0.0.1:9", time.monotonic()) as nobody:
        answer = await nobody.ask({"number": 0})
    assert (answer.status, answer.is_refused) == (NO_ANSWER, False)


def test_arrivals_are_drawn_by_their_name():
    times = poisson(50.0, 2.0, 12.0, "a")
    assert times == sorted(times) == poisson(50.0, 2.0, 12.0, "a") != poisson(50.0, 2.0, 12.0, "b")
    assert 400 < len(times) < 600
    assert 2.0 <= times[0] < times[-1] < 12.0


def test_the_census_finds_children_of_children_and_what_they_hold():
    grandchild = "import sys; files = [open('/dev/null') for _ in range(40)]; sys.stdin.read()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    others = {each.pid for each in processes()}  # of other tests: a store, say
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE) as process:
        try:
            until = time.monotonic() + 30
            found: list[Process] = []
            while not any(each.descriptors >= 40 for each in found):
                assert time.monotonic() < until
                time.sleep(0.02)
                found = [each for each in processes() if each.pid not in others]
            assert process.pid in [each.pid for each in found]
            assert all(each.rss_bytes > 1 << 20 for each in found if each.descriptors >= 40)
            assert all(each.name.startswith("python") for each in found if each.descriptors >= 40)
        finally:
            process.communicate(b"")
