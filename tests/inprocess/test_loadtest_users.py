"""Locust's users before servers that lie or are slow: what is wrong is found, nothing is hidden."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image

from loadtest.load_plan import PlanOptions, make_plan
from loadtest.locust_process import offer
from loadtest.picture_proof import NOT_A_PICTURE, WRONG_BYTES, WRONG_SIZE
from loadtest.request_mix import ModelFacts

# Looked for and not imported: it patches whoever imports it.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="needs locust: pip install -e '.[dev]'"
)
MODEL = ModelFacts("liar", 64, 64, 4, 1.0, "euler", "normal", 16, 64, 64)


class Door(BaseHTTPRequestHandler):
    """A front door that has its pictures already; how it answers is for others to say."""

    protocol_version = "HTTP/1.1"
    pictures: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def do_GET(self) -> None:
        self.send(200, self.pictures[self.path], "image/png")

    def answer(self, request: dict[str, Any]) -> None:
        raise NotImplementedError

    def send_result(self, name: str, promised: bytes | None = None) -> None:
        sha256 = hashlib.sha256(promised or self.pictures[name]).hexdigest()
        image = {"url": f"http://{self.headers['host']}{name}", "sha256": sha256}
        self.send(200, json.dumps({"id": "x", "images": [image]}).encode())

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


Door.pictures = {
    "/64.png": picture(64),
    "/80.png": picture(80),
    "/broken.png": picture(64)[:-30],
}


class Liar(Door):
    """Is wrong in one of several ways, by the request's seed."""

    def answer(self, request: dict[str, Any]) -> None:
        way = request["seed"] % 5
        if way == 0:
            self.send(429, b"Too many requests", "text/plain")
        elif way == 1:
            self.send(503, json.dumps({"error": {"code": "stage_unavailable"}}).encode())
        elif way == 2:
            self.send_result("/80.png")
        elif way == 3:
            self.send_result("/64.png", b"another picture")
        else:
            self.send_result("/broken.png")


class OneAtATime(Door):
    """Takes its time for each, and lets the others wait."""

    pause_s = 0.15
    turn = threading.Lock()
    came: ClassVar[list[float]] = []

    def answer(self, request: dict[str, Any]) -> None:
        self.came.append(time.time())
        with self.turn:
            time.sleep(self.pause_s)
        self.send_result("/64.png")


@contextmanager
def listening(door: type[Door]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), door) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_whatever_is_not_the_picture_asked_for_is_found_and_told_apart(tmp_path: Path):
    plan = make_plan(PlanOptions(rate=25, duration_s=1), MODEL, ("native",))
    with listening(Liar) as url:
        outcomes = offer(url, plan, tmp_path).outcomes
    told = ("proxy_overloaded", "stage_unavailable", WRONG_SIZE, WRONG_BYTES, NOT_A_PICTURE)
    assert {each.number: each.error for each in outcomes} == {
        ask.number: told[ask.request["seed"] % 5] for ask in plan.asks
    }
    assert len({each.error for each in outcomes}) == 5


def test_a_slow_server_is_asked_no_less_and_its_queue_is_not_hidden(tmp_path: Path):
    plan = make_plan(PlanOptions(rate=20, duration_s=0.7), MODEL, ("native",))
    with listening(OneAtATime) as url:
        offered = offer(url, plan, tmp_path)
    assert {each.error for each in offered.outcomes} == {""}
    # All had come before the half of them were done.
    assert max(OneAtATime.came) - offered.began < OneAtATime.pause_s * len(plan.asks) / 2 + 0.7
    slowest = max(each.latency_s for each in offered.outcomes)
    assert slowest > OneAtATime.pause_s * len(plan.asks) - plan.asks[-1].at
    # Locust's own statistics say the same, in whole milliseconds: requests, failures, average,
    # least and most.
    row = re.search(
        r"POST /v1/generate\s+(\d+)\s+0\(0.00%\) \|\s+\d+\s+\d+\s+(\d+)",
        (tmp_path / "locust.log").read_text(),
    )
    assert row is not None
    assert int(row[1]) == len(plan.asks)
    assert int(row[2]) == pytest.approx(1000 * slowest, abs=2)
