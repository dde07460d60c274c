"""How late a load generator sends what is due: whether it measured the server or itself.

    python -m loadtest.lateness --json

A generator that lags offers another load than it says. So every report tells how late its own
requests went out, and what the same generator does here against a server that answers at once, in
a process of its own. Beyond `MOST_P99_MS` the generator was the bottleneck, and its report says so.
The command measures `loadtest.open_loop`; `kelvin loadtest` measures its locust the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loadtest.latencies import percentile
from loadtest.open_loop import Door, poisson

RATE = 200.0  # requests a second, at which generators are measured
MOST_P99_MS = 20.0
SIDE = 64  # pixels; of the picture that the instant server has


def lateness_of(late_s: Sequence[float]) -> dict[str, Any]:
    """Return what a run's lateness comes to.

    Args:
        late_s: For each request, the seconds from when it was due to when it was sent.

    Returns:
        `p50_ms`, `p99_ms`, `most_ms`, `requests`, and `is_bottleneck`: whether the generator lagged
        too much for its figures to be the server's. Of no requests, only that there were none.
    """
    late_ms = sorted(1000.0 * max(each, 0.0) for each in late_s)
    if not late_ms:
        return {"requests": 0, "is_bottleneck": False}
    p99_ms = percentile(late_ms, 0.99)
    return {
        "requests": len(late_ms),
        "p50_ms": round(percentile(late_ms, 0.50), 2),
        "p99_ms": round(p99_ms, 2),
        "most_ms": round(late_ms[-1], 2),
        "is_bottleneck": p99_ms > MOST_P99_MS,
    }


def bottleneck_note(measured: Iterable[Mapping[str, Any]]) -> str | None:
    """Return what a report must say where its generator lagged, given `lateness_of` of its runs."""
    lagged = [each["p99_ms"] for each in measured if each["is_bottleneck"]]
    if not lagged:
        return None
    return (
        f"The load generator was the bottleneck: p99 of its lateness was up to {max(lagged):g} ms, "
        f"of {MOST_P99_MS:g} at most. These figures are its own as well."
    )


@contextmanager
def instant_server() -> Iterator[str]:
    """Yield the URL of a native front door, in another process, that answers at once.

    Whatever is asked of `/v1/generate`, it has made the same picture of `SIDE` x `SIDE` already.
    """
    command = [sys.executable, "-m", "loadtest.lateness", "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip() if process.stdout is not None else ""
        finally:
            process.terminate()


def measure(rate: float = RATE, seconds: float = 5.0) -> dict[str, Any]:
    """Return the lateness of `loadtest.open_loop` at a Poisson rate against an instant server.

    With it `answer_p99_ms`, from due to answered: what the generator adds to every latency.
    """

    async def offer(url: str) -> dict[str, Any]:
        times = poisson(rate, 0.1, 0.1 + seconds, "lateness")
        async with Door(url, time.monotonic()) as door:
            answers = await door.offer(times, lambda number: {"prompt": f"picture {number}"})
        answered = sorted(1000.0 * each.seconds for each in answers)
        return {
            "generator": "loadtest.open_loop",
            "rate": rate,
            **lateness_of([each.late_s for each in answers]),
            "answer_p99_ms": round(percentile(answered, 0.99), 2),
            "failed": sum(each.status != 200 for each in answers),
        }

    with instant_server() as url:
        return asyncio.run(offer(url))


async def _serve() -> None:
    answers: dict[bytes, bytes] = {}

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                path = head.split(b" ", 2)[1]
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        await reader.readexactly(int(line[15:]))
                writer.write(answers.get(path, _NOT_FOUND))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    picture = _picture()
    image = {
        "index": 0,
        "url": f"{url}/picture.png",
        "sha256": hashlib.sha256(picture).hexdigest(),
        "width": SIDE,
        "height": SIDE,
        "output_format": "png",
    }
    result = {"id": "instant", "seconds": 0.0, "images": [image], "stages": [], "joules": None}
    answers[b"/v1/generate"] = _answer("application/json", json.dumps(result).encode())
    answers[b"/picture.png"] = _answer("image/png", picture)
    print(url, flush=True)  # the parent reads it
    await server.serve_forever()


def _answer(kind: str, body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


_NOT_FOUND = _answer("text/plain", b"", "404 Not Found")


def _picture() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "#1f5fbf").save(file, "PNG")
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; exit 1 where the generator would be the bottleneck."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.lateness", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--rate", type=float, default=RATE, help="requests a second")
    add("--seconds", type=float, default=5.0, help="of requests")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        asyncio.run(_serve())
        return 0
    if not (0 < options.rate <= 10_000 and 0 < options.seconds <= 600):
        parser.error("--rate: above 0, at most 10000; --seconds: above 0, at most 600")
    found = measure(options.rate, options.seconds)
    print(json.dumps(found) if options.json else _line(found))
    return 1 if found["is_bottleneck"] else 0


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['generator']} at {found['rate']:g} requests a second: {found['p50_ms']} ms late "
        f"in the median, {found['p99_ms']} ms at p99, {found['most_ms']} ms at most"
    )


if __name__ == "__main__":
    sys.exit(main())
