"""A small real server that answers as a test tells it to, in Kelvin's place."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serve.requests import GenerateRequest, GenerateResult, ImageRef, JobEvent

PICTURE = b"the bytes of a picture"
JOB = "0123"


@dataclass
class FakeKelvin:
    """Answers as told: path -> list of answers, the last of which repeats."""

    url: str = ""
    answers: dict[tuple[str, str], list[Callable[[Any], None]]] = field(default_factory=dict)
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    authorized: list[tuple[str, str | None]] = field(default_factory=list)

    def on(self, method: str, path: str, *answers: Callable[[Any], None]) -> None:
        self.answers[method, path] = list(answers)

    def take(self, method: str, path: str) -> Callable[[Any], None]:
        nothing: list[Callable[[Any], None]] = [sends(404, {"detail": "Not Found"})]
        queue = self.answers.get((method, path), nothing)
        return queue.pop(0) if len(queue) > 1 else queue[0]


def sends(status: int, body: Any, kind: str = "application/json") -> Callable[[Any], None]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("content-type", kind)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def streams(*events: JobEvent, breaks: bool = False) -> Callable[[Any], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for event in events:
            text = f": keep-alive\n\nevent: {event.event}\ndata: {event.model_dump_json()}\n\n"
            chunk = text.encode()
            handler.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        if not breaks:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return answer


def served() -> Iterator[FakeKelvin]:
    """Yield one that answers on a real socket."""
    fake = FakeKelvin()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            fake.seen.append((self.command, self.path, body))
            fake.authorized.append((self.path, self.headers.get("authorization")))
            fake.take(self.command, self.path)(self)

        do_GET = do_POST = do_DELETE = _any

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


def image(kelvin: FakeKelvin, **changes: Any) -> ImageRef:
    known = {
        "index": 0,
        "s3_uri": "s3://kelvin/images/x.png",
        "url": f"{kelvin.url}/picture?signature=secret",
        "sha256": hashlib.sha256(PICTURE).hexdigest(),
        "size_bytes": len(PICTURE),
        "width": 64,
        "height": 64,
        "output_format": "png",
        "seed": 1,
    }
    return ImageRef.model_validate(known | changes)


def stored(kelvin: FakeKelvin) -> JobEvent:
    result = GenerateResult(
        id=JOB,
        model="pico",
        request=GenerateRequest(prompt="a circle", seed=1),
        images=(image(kelvin),),
        stages=(),
        seconds=0.5,
    )
    return JobEvent(event="stored", id=JOB, result=result)


def step(number: int) -> JobEvent:
    return JobEvent(event="step", id=JOB, image=0, step=number, steps=3)


def accept(kelvin: FakeKelvin) -> None:
    record = {"id": JOB, "status": "pending", "request": {"prompt": "a circle"}}
    kelvin.on("POST", "/v1/jobs", sends(202, record))
