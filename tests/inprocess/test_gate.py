"""Nobody comes in who should not: every route of the app, tried with every wrong key."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import websockets.exceptions
import websockets.sync.client

from serve.config import HttpSettings, StorageSettings
from serve.http.gate import Gate, needed_role
from serve.http.native import build_app
from serve.http.page import PAGE_PATHS
from serve.http.room import CallRoom
from serve.http.standing_paths import PUBLIC
from serve.job_ids import new_job_id
from serve.key_ring import KeyRing
from serve.key_store import FileKeys
from serve.keys import new_key
from serve.pipeline import Pipeline
from tests.inprocess.gated import JOB, calls, client, is_refusal, made, needing_keys, with_http
from tests.inprocess.polling import until
from tests.inprocess.served import served
from tests.inprocess.stand_in_stages import REQUEST, StandIn


@pytest.fixture
def pipeline(tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return needing_keys(storage, monkeypatch, tmp_path)


def tells_nothing(path: str, answer: httpx.Response) -> bool:
    """Return whether an answer to somebody unknown says nothing about anybody."""
    if path in PAGE_PATHS:
        return answer.status_code == 200
    if path == "/v1/session":
        # Logging in takes a key; logging out is for everybody.
        told: dict[str, Any] = {"tenant": None, "roles": [], "logged_in": False}
        is_login = answer.request.method == "POST"
        return is_refusal(answer, 401) if is_login else answer.json() == told
    return answer.status_code in (200, 503) and set(answer.json()) <= {"status", "ready"}


async def test_every_route_needs_a_key_that_counts(pipeline: Pipeline, keys: FileKeys):
    app = build_app(pipeline)
    good, _ = await made(keys)
    revoked, record = await made(keys)
    async with client(app, revoked) as http:
        assert (await http.get("/v1/models")).status_code == 200
    await keys.remove(record.digest)
    wrong = [None, "", "guess", new_key("acme", ("admin",))[0], good[:-1], good.upper(), revoked]
    tried = 0
    for method, path in calls(app, new_job_id()):
        for key in wrong:
            async with client(app, key) as http:
                answer = await http.request(method, path, json=JOB)
                through_path = await http.request(method, f"/k/{key}{path}", json=JOB)
                basic = await http.request(method, path, auth=("kelvin", key or ""), json=JOB)
            if key is None and path in PUBLIC:
                assert tells_nothing(path, answer), (method, path)
            else:
                assert is_refusal(answer, 401), (method, path, key)
                assert len(answer.headers.get_list("www-authenticate")) == 2
            assert is_refusal(through_path, 401), (method, path, key)
            assert is_refusal(basic, 401), (method, path, key)
            tried += 1
    assert tried >= 70
    assert not pipeline._live


async def test_what_tells_of_the_whole_service_is_for_admins(pipeline: Pipeline, keys: FileKeys):
    app = build_app(pipeline)
    generates, administers = await made(keys), await made(keys, "acme", "admin")
    job_id = new_job_id()
    for method, path in calls(app, job_id):
        role = needed_role(method, path)
        for (key, _), has in ((generates, "generate"), (administers, "admin")):
            async with client(app, key) as http:
                answer = await http.request(method, path, content=b"{")
            if role not in (None, has):
                assert is_refusal(answer, 403), (method, path, has)
            else:
                assert answer.status_code not in (401, 403, 500), (method, path, has)
    assert needed_role("GET", "/v1/status") == "admin"


async def test_a_key_is_taken_wherever_a_client_can_put_it(pipeline: Pipeline, keys: FileKeys):
    app = build_app(pipeline)
    key, _ = await made(keys)
    async with client(app) as http:
        for answer in (
            await http.get("/v1/models", headers={"authorization": f"Bearer {key}"}),
            await http.get("/v1/models", headers={"authorization": f"bearer  {key} "}),
            await http.get("/v1/models", auth=("anybody", key)),
            await http.get(f"/k/{key}/v1/models"),
            await http.get(f"/k/{key}/v1/models/"),
        ):
            assert answer.status_code == 200
        posted = await http.post(f"/k/{key}/v1/generate", json=JOB)
        assert posted.status_code == 200
        no_slash = await http.get(f"/k/{key}")
        assert is_refusal(no_slash, 401)
        bad = base64.b64encode(b"\xff:\xfe").decode()
        assert is_refusal(
            await http.get("/v1/models", headers={"authorization": f"Basic {bad}"}), 401
        )


async def test_events_are_told_to_nobody_whose_key_is_revoked(
    storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: FileKeys
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = needing_keys(storage, monkeypatch, tmp_path, stages)
    key, record = await made(keys)
    job = await pipeline.submit(REQUEST, "acme")
    told: list[str] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        told.append(message.get("body", b"").decode())

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/v1/jobs/{job.id}/events",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode())],
    }
    following = asyncio.create_task(build_app(pipeline)(scope, receive, send))
    await until(lambda: "event: step" in "".join(told))
    await keys.remove(record.digest)
    stages.gate.set()
    await asyncio.wait_for(following, 20)
    assert "stored" not in "".join(told)

    async def is_stored() -> bool:
        return (await pipeline.job(job.id, "acme")).status == "succeeded"

    await until(is_stored)  # what was followed goes on


@pytest.mark.parametrize("prefix", ["/k/", "/%6b/", "/k%2F"])
async def test_nothing_behind_the_gate_sees_a_key_in_the_path(prefix: str, keys: FileKeys):
    key, _ = await made(keys)
    seen: list[dict[str, Any]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    path = unquote(f"{prefix}{key}/v1/jobs/é x")
    raw = f"{prefix}{key.replace('e', '%65')}/v1/jobs/%C3%A9%20x".encode()
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": raw, "headers": []}
    gate = Gate(behind, HttpSettings(host="0.0.0.0"), KeyRing(keys), CallRoom(9, 9))
    await gate(scope, None, None)  # type: ignore[arg-type]
    (told,) = seen
    assert (told["path"], told["raw_path"]) == ("/v1/jobs/é x", b"/v1/jobs/%C3%A9%20x")


async def test_a_key_in_the_path_is_written_down_nowhere(
    pipeline: Pipeline,
    keys: FileKeys,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    async def broken() -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(pipeline, "models", broken)
    app = build_app(pipeline)
    key, _ = await made(keys)
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        async with client(app) as http:
            for path in ("/v1/models", "/v1/nothing", "/v1/generate", f"/K/{key}/x", "/v1/jobs/"):
                answer = await http.get(f"/k/{key}{path}")
                said += [answer.text, str(answer.headers)]
                said += [(await http.get(f"//k/{key}{path}")).text]
    # httpx, the client of this test, says what it was asked for.
    said += [record.getMessage() for record in caplog.records if record.name != "httpx"]
    assert any("failed" in text for text in said)
    assert key[10:30] not in "\n".join(said)


async def test_a_socket_without_a_key_is_closed_before_it_opens(pipeline: Pipeline):
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/ws", "headers": [], "client": ("9.9.9.9", 1)}
    await build_app(pipeline)(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_a_socket_that_is_refused_is_told_why_where_the_server_can_say_it(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: FileKeys
):
    key, _ = asyncio.run(made(keys))
    pipeline = with_http(storage, monkeypatch, tmp_path, most_calls=2, host="0.0.0.0")
    with served(pipeline) as server:
        address = f"{server.url.replace('http', 'ws', 1)}/ws"
        shown = {"Authorization": f"Bearer {key}"}

        def refusal(**headers: str) -> Any:
            with (
                pytest.raises(websockets.exceptions.InvalidStatus) as caught,
                websockets.sync.client.connect(address, additional_headers=headers),
            ):
                pass
            return caught.value.response

        nobody = refusal()
        assert nobody.status_code == 401
        assert json.loads(nobody.body)["error"]["type"] == "unauthenticated"
        assert nobody.headers.get_all("www-authenticate")
        with websockets.sync.client.connect(address, additional_headers=shown) as first:
            first.recv(timeout=20)
            full = refusal(**shown)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) > 0
        told = json.loads(full.body)
        assert told["error"]["type"] == "overloaded"
        assert told["node_errors"] == {}
