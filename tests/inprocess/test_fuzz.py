"""A small fuzz of everything that the service's OpenAPI document lists, on a real HTTP server.

Stages are stand-ins here; `python -m loadtest.fuzz` sends thousands to a whole Kelvin.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvicorn

from loadtest.fuzz import fuzz
from loadtest.fuzz_verdict import faults, handle_faults, insides
from serve.config import StorageSettings
from serve.errors import InvalidRequest, JobNotFound, StageFailed
from serve.http.native import build_app
from serve.pipeline import Pipeline
from tests.inprocess.stand_in_stages import StandIn, new_pipeline


class Served:
    """A Pipeline behind uvicorn in a thread of its own, and a handle to it."""

    def __init__(self, make: Callable[[], Pipeline]) -> None:
        self._make = make
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pipeline = self._make()
        config = uvicorn.Config(build_app(self._pipeline), port=0, log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        (socket,) = self._server.servers[0].sockets
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self._ready.set()
        await serving

    def __getattr__(self, method: str) -> Any:
        return Method(self._loop, getattr(self._pipeline, method))


class Method:
    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[..., Any]) -> None:
        self._loop = loop
        self._call = call

    def remote(self, *arguments: Any) -> Method:
        calling: Coroutine[Any, Any, Any] = self._call(*arguments)
        self._future = asyncio.run_coroutine_threadsafe(calling, self._loop)
        return self

    def result(self, timeout_s: float) -> Any:
        return self._future.result(timeout_s)


@pytest.fixture
def served(storage: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with Served(lambda: new_pipeline(StandIn(), storage, monkeypatch)) as served:
        yield served


def test_nothing_that_is_sent_gets_a_500_or_the_servers_insides(served: Served):
    tally = fuzz(served.url, served, cases=200, seed=1, quiet=True)
    assert tally.cases >= 200
    assert not tally.faults, "\n".join(map(str, tally.faults))
    assert {"fitting", "unfitting", "changed", "raw", "strange", "handle"} == set(tally.by_kind)
    assert tally.report()["answers"].get("200", 0) > 20, "much of it is taken"
    assert tally.jobs


def error(text: str = "no", **fields: Any) -> str:
    return json.dumps(JobNotFound(text, **fields).body())


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, error()),
        (404, "Not Found"),
        (404, '{"detail": "Not Found"}'),
        (404, json.dumps({"error": {"message": "no"}})),
        (404, error('File "x", line 3, in f')),
        (404, error("No such file: /opt/models/x")),
        (200, '{"directory": "/var/tmp/spool"}'),
        (200, "Traceback (most recent call last):"),
        (200, "<X object at 0x7f0123456789>"),
        (400, error("in site-packages")),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(status: int, body: str):
    asked: dict[str, Any] = {"method": "GET", "path": "/v1/jobs/x"}
    assert faults(status, {}, body, **asked)
    assert faults(200, {"Server": "/usr/lib/python3"}, "", **asked)
    assert faults(404, {"Retry-After": "2"}, error(), **asked) == []


def test_what_was_sent_may_come_back():
    assert insides("/etc/passwd is no model", "model=/etc/passwd") == []
    assert insides("s3://bucket/images/x.png http://127.0.0.1:8333/tmp/x") == []
    refused = InvalidRequest("No.", field="x", value="/etc/passwd")
    assert handle_faults(refused) == []
    assert handle_faults(StageFailed("x"))
    assert handle_faults(TypeError("x"))
