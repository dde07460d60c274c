"""The HTTP routes around a stand-in for the Pipeline: what only the front door decides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serve.config import Settings
from serve.errors import DeadlineExceeded, JobNotFound, Overloaded, StageUnavailable
from serve.http.body import read_json
from serve.http.native import build_app
from serve.http.proxy_headers import middlewares
from serve.http.server_sent_events import event_response
from serve.requests import JobEvent


class StandIn:
    """Raises what it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.settings = Settings()
        self.before_deletion: list[Any] = []
        self.error = error

    async def generate(self, request: Any, tenant: str) -> Any:
        raise self.error or RuntimeError("the secret cause")

    async def job(self, job_id: str, tenant: str) -> Any:
        raise JobNotFound("No job has this id.", field="id", value=job_id)

    async def events(self, job_id: str, tenant: str) -> AsyncIterator[JobEvent]:
        raise JobNotFound("No job has this id.", field="id", value=job_id)
        yield

    async def ready(self) -> dict[str, Any]:
        return {"ready": False, "checks": [{"name": "store", "ok": False, "detail": "gone"}]}


def client(pipeline: StandIn) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(pipeline), raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


@pytest.mark.parametrize("error", [Overloaded("full"), StageUnavailable("gone")])
async def test_what_passes_by_itself_says_when_to_come_back(error: Any):
    async with client(StandIn(error)) as http:
        answer = await http.post("/v1/generate", json={"prompt": "a"})
    assert answer.status_code == error.status
    assert answer.json() == error.body()
    assert int(answer.headers["retry-after"]) > 0


async def test_a_deadline_that_passed_is_504_and_no_invitation_to_try_again():
    error = DeadlineExceeded("Too late.", field="deadline_s", value=0.5, allowed="more")
    async with client(StandIn(error)) as http:
        answer = await http.post("/v1/generate", json={"prompt": "a", "deadline_s": 0.5})
    assert answer.status_code == 504
    assert answer.json() == error.body()
    assert "retry-after" not in answer.headers


async def test_intervals_come_as_json_lists():
    async with client(StandIn(Overloaded("reached"))) as http:
        fields = {"prompt": "a", "guidance_interval": [0.2, 0.9], "negative_prompt_range": [0, 1]}
        assert (await http.post("/v1/generate", json=fields)).status_code == 429
        wrong = await http.post("/v1/generate", json={**fields, "guidance_interval": [0.9, 0.2]})
    assert wrong.status_code == 400
    assert wrong.json()["error"]["field"] == "guidance_interval"


async def anybody() -> bool:
    return True


async def test_a_step_carries_its_preview():
    async def rest() -> AsyncIterator[JobEvent]:
        yield JobEvent(event="step", id="1", step=2, steps=4, path="graph", preview="abc=")

    response = event_response(JobEvent(event="queued", id="1"), rest(), anybody)
    sent = [str(part) async for part in response.body_iterator]
    told = json.loads(sent[1].split("data: ")[1])
    assert (told["preview"], told["path"]) == ("abc=", "graph")
    assert "preview" not in sent[0]


async def test_a_bug_answers_without_its_insides():
    async with client(StandIn()) as http:
        answer = await http.post("/v1/generate", json={"prompt": "a"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


async def test_a_length_of_strange_digits_is_no_length():
    headers = {b"content-length": "²²".encode("latin-1")}
    async with client(StandIn(Overloaded("reached"))) as http:
        answer = await http.post("/v1/generate", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 429, "it was read"


async def test_a_parameter_that_a_route_itself_refuses_is_an_error_like_any_other():
    app = build_app(StandIn())  # type: ignore[arg-type]

    @app.get("/v1/added")
    async def added(number: int) -> int:
        return number

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        for query in ("", "?number=x"):
            answer = await http.get(f"/v1/added{query}")
            assert answer.status_code == 400
            assert answer.json()["error"]["field"] == "number"
            assert answer.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("name", ["X-Request-Id", "serve-multiplexed-model-id", "X-Session-Id"])
async def test_what_serves_proxy_cannot_read_does_not_reach_it(name: str):
    outermost = middlewares()[-1]
    seen: list[Any] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        seen.append([value.decode() for _, value in scope["headers"]])

    header = name.encode()
    others = [(b"host", b"x"), (header, b"mine-1"), (b"authorization", "Bearer é".encode())]
    scope = {"type": "http", "headers": [*others, (header, b"\xc1\x98")]}
    await outermost.cls(proxy)(scope, None, None)  # type: ignore[call-arg, arg-type]
    assert seen == [["x", "mine-1", "Bearer é"]]
    await outermost.cls(proxy)({"type": "http", "headers": others}, None, None)  # type: ignore[call-arg, arg-type]
    assert seen[1] == seen[0]


async def test_not_ready_is_503_and_says_why():
    async with client(StandIn()) as http:
        answer = await http.get("/readyz")
        alive = await http.get("/healthz")
    assert answer.status_code == 503
    assert answer.json()["checks"][0]["detail"] == "gone"
    assert alive.status_code == 200


async def test_events_of_an_unknown_job_are_no_stream():
    async with client(StandIn()) as http:
        answer = await http.get("/v1/jobs/7/events")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "JobNotFound"


async def test_events_that_break_off_are_a_stream_that_ends():
    async def rest() -> AsyncIterator[JobEvent]:
        yield JobEvent(event="text", id="1")
        raise JobNotFound("It was deleted.", field="id", value="1")

    response = event_response(JobEvent(event="queued", id="1"), rest(), anybody)
    told = [part async for part in response.body_iterator]
    assert [str(part).splitlines()[0] for part in told] == ["event: queued", "event: text"]


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "APPLICATION/JSON",
        "application/json; charset=utf-8",
        'application/json; charset="UTF-8"',
        "application/problem+json",
    ],
)
async def test_json_by_any_of_its_names_is_taken(content_type: str | None):
    headers = {} if content_type is None else {"content-type": content_type}
    async with client(StandIn(Overloaded("reached"))) as http:
        answer = await http.post("/v1/generate", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 429


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "multipart/form-data; boundary=x", "application/json; charset=utf-16", "x"],
)
async def test_other_content_types_are_refused(content_type: str):
    async with client(StandIn()) as http:
        answer = await http.post(
            "/v1/generate", content=b"{}", headers={"content-type": content_type}
        )
    assert answer.status_code == 415


async def test_reading_stops_once_too_much_has_come():
    chunks_taken = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal chunks_taken
        while True:
            chunks_taken += 1
            yield b"x" * 100

    request: Any = SimpleNamespace(headers={}, scope={}, stream=stream)
    from serve.errors import PayloadTooLarge

    with pytest.raises(PayloadTooLarge) as caught:
        await read_json(request, 1000)
    assert caught.value.field == "body"
    assert chunks_taken == 11


async def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.http.body._ARRIVES_WITHIN_S", 0.05)

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async with client(StandIn()) as http:
        answer = await http.post("/v1/generate", content=trickle())
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "body_too_slow"
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("opening", ["[", '{"a":', '{"prompt": ['])
async def test_json_nested_too_deeply_is_refused(opening: str):
    async with client(StandIn()) as http:
        answer = await http.post("/v1/generate", content=opening * 50_000)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("values", [b"[]", b"{}", b"1", b'"a,"'])
async def test_json_of_millions_of_values_is_refused_unread(values: bytes):
    async with client(StandIn()) as http:
        body = b'{"prompt": [' + b",".join([values] * (2 << 20)) + b"]"  # it does not even end
        answer = await http.post("/v1/generate", content=body)
    assert answer.status_code == 400
    assert "too many values" in answer.json()["error"]["message"]


async def test_silence_is_filled_with_heartbeats():
    go = asyncio.Event()

    async def rest() -> AsyncIterator[JobEvent]:
        await go.wait()
        yield JobEvent(event="cancelled", id="1")

    response = event_response(JobEvent(event="queued", id="1"), rest(), anybody, heartbeat_s=0.01)
    sent: list[str] = []
    async for part in response.body_iterator:
        sent.append(str(part))
        if len(sent) == 4:
            go.set()
    assert sent[0].startswith("event: queued\ndata: ")
    assert ": heartbeat\n\n" in sent[1:4]
    assert sent[-1].startswith("event: cancelled\n")
    assert json.loads(sent[-1].split("data: ")[1]) == {"event": "cancelled", "id": "1"}
    assert all(part.endswith("\n\n") for part in sent)
