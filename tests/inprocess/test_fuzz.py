"""A small fuzz of everything that the service's OpenAPI document lists, on a real HTTP server.

Stages are stand-ins here; `python -m loadtest.fuzz` sends thousands to a whole Kelvin.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from loadtest.fuzz import fuzz
from loadtest.fuzz_verdict import faults, handle_faults, insides
from serve.errors import InvalidRequest, JobNotFound, StageFailed
from serve.pipeline import Pipeline
from tests.inprocess.served import Served, served


class Handle:
    """Calls a Pipeline on its server's loop, as `serve.get_app_handle` calls one elsewhere."""

    def __init__(self, pipeline: Pipeline, server: Served) -> None:
        self._pipeline = pipeline
        self._loop = server.loop

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


def test_nothing_that_is_sent_gets_a_500_or_the_servers_insides(pipeline: Pipeline):
    with served(pipeline) as server:
        tally = fuzz(server.url, Handle(pipeline, server), cases=200, seed=1, quiet=True)
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
