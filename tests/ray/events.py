"""Reading server-sent events as a client does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx


@contextmanager
def following(http: httpx.Client, job_id: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Open a job's event stream; leaving the block hangs up."""
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield _events(answer)


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert event["event"] == name
            yield event
