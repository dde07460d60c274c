"""Nobody comes in who should not: every route of the app, tried with every wrong key."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import websockets.exceptions
import websockets.sync.client
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts
from starlette.routing import Route

from serve import key_ring
from serve.config import HttpSettings, StorageSettings, load_settings
from serve.errors import JobNotFound, KelvinError
from serve.http.error_shapes import error_body
from serve.http.gate import PUBLIC, Gate, needed_role
from serve.http.native import build_app
from serve.http.page import PAGE_PATHS
from serve.http.room import CallRoom
from serve.job_ids import new_job_id
from serve.key_ring import KeyRing
from serve.key_store import FileKeys
from serve.keys import KeyRecord, new_key
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from tests.inprocess.served import served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline

JOB = {"prompt": "a", "seed": 5}


@pytest.fixture
def keys(tmp_path: Path) -> FileKeys:
    return FileKeys(tmp_path / "keys.json")


@pytest.fixture
def pipeline(
    keys: FileKeys, tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    """One that listens to others, so that everybody needs a key."""
    monkeypatch.setattr(key_ring, "REVOKED_WITHIN_S", 0.0)
    monkeypatch.setattr(key_ring, "_NEW_WITHIN_S", 0.0)
    return with_http(storage, monkeypatch, tmp_path, host="0.0.0.0")


def with_http(
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    most_calls: int = 256,
    **http: Any,
) -> Pipeline:
    file, calls = {"file": str(folder / "keys.json")}, {"max_ongoing_requests": most_calls}
    settings = load_settings(overrides={"http": http, "keys": file, "pipeline": calls})
    sections: dict[str, Any] = {
        name: getattr(settings, name) for name in ("http", "keys", "pipeline")
    }
    return new_pipeline(StandIn(), storage, monkeypatch, **sections)


async def made(keys: FileKeys, tenant: str = "acme", *roles: Any) -> tuple[str, KeyRecord]:
    key, record = new_key(tenant, roles or ("generate",))
    await keys.add(record)
    return key, record


def client(
    app: FastAPI, key: str | None = None, peer: str = "10.1.2.3", base: str = "http://10.0.0.1"
) -> httpx.AsyncClient:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(peer, 5))
    return httpx.AsyncClient(transport=transport, base_url=base, headers=headers)


def calls(app: FastAPI, job_id: str) -> Iterator[tuple[str, str]]:
    """Yield (method, path) of all that the app has; one of a kind unknown here fails."""
    for context in iter_route_contexts(app.routes):
        kind = type(context.original_route)
        if issubclass(kind, APIWebSocketRoute):
            continue  # a test of its own, below
        assert issubclass(kind, APIRoute | Route), f"{context.path}: say here how it is called"
        for method in context.methods or ():
            path = (context.path or "").replace("{job_id}", job_id).replace("{index}", "0")
            path = re.sub(r"\{(prompt_id|node_class|folder|name(:path)?)\}", "x", path)
            assert "{" not in path, f"{path}: say here what stands in its place"
            yield method, path


def is_refusal(answer: httpx.Response, status: int) -> bool:
    if answer.request.method == "HEAD":
        return answer.status_code == status
    path = re.sub("^/k/[^/]*", "", answer.request.url.path)
    told, empty = answer.json(), error_body(KelvinError(""), {"path": path})
    return answer.status_code == status and keys_of(told) == keys_of(empty)


def keys_of(body: dict[str, Any]) -> dict[str, Any]:
    return {name: set(value) if isinstance(value, dict) else None for name, value in body.items()}


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


async def test_no_tenant_finds_what_is_anothers(
    pipeline: Pipeline, keys: FileKeys, storage: StorageSettings
):
    app = build_app(pipeline)
    own, _ = await made(keys, "acme")
    other, _ = await made(keys, "globex", "generate", "admin")
    stages: Any = pipeline._models.own.stages.pools["denoise"]["narrow"]
    async with client(app, own) as http:
        done = (await http.post("/v1/generate", json=JOB)).json()
        stages.gate.clear()
        running = (await http.post("/v1/jobs", json=JOB)).json()
    assert running["tenant"] == "acme"
    unknown = new_job_id()
    tried = 0
    for job_id in (done["id"], running["id"]):
        for method, path in calls(app, job_id):
            if job_id not in path:
                continue
            for query in ("", "?purge=true"):
                async with client(app, other) as http:
                    answer = await http.request(method, path + query)
                    nothing = await http.request(method, path.replace(job_id, unknown) + query)
                assert answer.status_code == nothing.status_code == 404, (method, path)
                assert answer.text == nothing.text.replace(unknown, job_id)
                tried += 1
    assert tried >= 12
    # Nor does who needs no key elsewhere, or calls by handle for another tenant.
    for tenant in ("default", "globex"):
        for call in (pipeline.job, pipeline.cancel, pipeline.delete):
            with pytest.raises(JobNotFound):
                await call(running["id"], tenant)
        with pytest.raises(JobNotFound):
            await anext(pipeline.events(running["id"], tenant))
    stages.gate.set()
    async with client(app, own) as http:
        assert (await http.get(f"/v1/jobs/{done['id']}")).json()["status"] == "succeeded"
        told = await http.get(f"/v1/jobs/{running['id']}/events")
        assert '"event":"stored"' in told.text
        record = (await http.get(f"/v1/jobs/{running['id']}")).json()
        assert (record["status"], record["tenant"]) == ("succeeded", "acme")
        (image,) = record["result"]["images"]
        assert f"/images/acme/{running['id']}/0-" in image["s3_uri"]
        assert (await http.delete(f"/v1/jobs/{running['id']}?purge=true")).status_code == 200
        assert (await http.get(f"/v1/jobs/{running['id']}")).status_code == 404
    store = ObjectStore(storage)
    left = await store.list_keys("images/acme/")
    store.close()
    assert [key.split("/")[2] for key in left] == [done["id"]]


async def test_no_tenant_can_hold_all_calls(
    keys: FileKeys, tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = with_http(storage, monkeypatch, tmp_path, most_calls=6, host="0.0.0.0")
    app = build_app(pipeline)
    stages: Any = pipeline._models.own.stages.pools["denoise"]["narrow"]
    stages.gate.clear()
    greedy, modest = (await made(keys, "acme"))[0], (await made(keys, "globex"))[0]
    # One job, and many who wait for it.
    asked = JOB | {"idempotency_key": "k"}
    async with client(app, greedy) as http, client(app, modest) as other:
        waiting = [asyncio.create_task(http.post("/v1/generate", json=asked)) for _ in range(9)]
        refused, held = await asyncio.wait(waiting, timeout=5, return_when=asyncio.ALL_COMPLETED)
        assert len(held) == 3
        for answer in (task.result() for task in refused):
            assert is_refusal(answer, 429)
            assert int(answer.headers["retry-after"]) > 0
        assert (await other.get("/v1/models")).status_code == 200
        assert is_refusal(await http.get("/v1/models"), 429)
        assert (await http.get("/healthz")).status_code == 200
        (job_id,) = pipeline._live
        assert (await http.delete(f"/v1/jobs/{job_id}")).status_code == 200
        assert {(await task).status_code for task in held} == {409}
        assert (await http.get("/v1/models")).status_code == 200


async def test_an_idempotency_key_is_its_tenants_own(pipeline: Pipeline, keys: FileKeys):
    app = build_app(pipeline)
    asked = JOB | {"idempotency_key": "order-17"}
    ids: dict[str, str] = {}
    for tenant in ("acme", "globex"):
        key, _ = await made(keys, tenant)
        async with client(app, key) as http:
            ids[tenant] = (await http.post("/v1/generate", json=asked)).json()["id"]
            again = (await http.post("/v1/generate", json=asked)).json()["id"]
            assert again == ids[tenant]
    assert len(set(ids.values())) == 2


async def test_a_body_cannot_say_whose_it_is(pipeline: Pipeline, keys: FileKeys):
    key, _ = await made(keys, "acme")
    async with client(build_app(pipeline), key) as http:
        answer = await http.post("/v1/generate", json=JOB | {"tenant": "globex"})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "tenant"


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


@pytest.mark.parametrize("prefix", ["/k/", "/%6b/", "/k%2F"])
async def test_nothing_behind_the_gate_sees_a_key_in_the_path(prefix: str, keys: FileKeys):
    key, _ = await made(keys)
    seen: list[dict[str, Any]] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    path = unquote(f"{prefix}{key}/v1/jobs/é x")
    raw = f"{prefix}{key.replace('e', '%65')}/v1/jobs/%C3%A9%20x".encode()
    scope = {"type": "http", "method": "GET", "path": path, "raw_path": raw, "headers": []}
    await Gate(behind, HttpSettings(host="0.0.0.0"), KeyRing(keys), CallRoom(9))(scope, None, None)  # type: ignore[arg-type]
    (told,) = seen
    assert (told["path"], told["raw_path"]) == ("/v1/jobs/é x", b"/v1/jobs/%C3%A9%20x")


async def test_where_no_key_is_needed_only_one_of_ours_can_be_wrong(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    app = build_app(with_http(storage, monkeypatch, tmp_path, host="127.0.0.1"))
    ours = new_key("acme", ("generate",))[0]
    for key, status in (("sk-of-another-service", 200), ("none", 200), (ours, 401), ("", 401)):
        async with client(app, key, "127.0.0.1", "http://127.0.0.1") as http:
            assert (await http.get("/v1/models")).status_code == status
    async with client(app, "none", "10.1.2.3", "http://127.0.0.1") as http:
        assert (await http.get("/v1/models")).status_code == 401


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


FOREIGN: list[dict[str, str]] = [
    {"origin": "https://evil.example"},
    {"origin": "http://127.0.0.1:9000"},
    {"origin": "https://127.0.0.1:8443"},
    {"origin": "http://127.0.0.1@evil.example"},
    {"origin": "http://127.0.0.1.evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://127.0.0.1, http://evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"host": "evil.example", "origin": "http://evil.example"},  # DNS rebinding
    {"host": "evil.example"},
    {"host": "evil.example:80"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "192.168.1.7"},
    {"host": ""},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_web_page_elsewhere_cannot_post_to_loopback(
    headers: dict[str, str],
    storage: StorageSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    pipeline = with_http(storage, monkeypatch, tmp_path)
    app = build_app(pipeline)
    async with client(app, peer="127.0.0.1", base="http://127.0.0.1") as http:
        for method, path in calls(app, new_job_id()):
            if method in ("POST", "DELETE"):
                answer = await http.request(method, path, json=JOB, headers=headers)
                assert is_refusal(answer, 403), (method, path)
                assert '"foreign_origin"' in answer.text
    assert not pipeline._live


async def test_loopback_needs_no_key(
    storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    app = build_app(with_http(storage, monkeypatch, tmp_path))
    own: list[tuple[str, dict[str, str]]] = [
        ("http://127.0.0.1", {}),
        ("http://localhost:8000", {"origin": "http://localhost:8000"}),
        ("http://[::1]:8000", {"origin": "http://[::1]:8000", "sec-fetch-site": "same-origin"}),
    ]
    for base, headers in own:
        async with client(app, peer="::1", base=base) as http:
            assert (await http.post("/v1/jobs", json=JOB, headers=headers)).status_code == 202
            assert (await http.get("/v1/status")).status_code == 200
    forwarded = [
        {"x-forwarded-for": "9.9.9.9"},
        {"x-real-ip": "9.9.9.9"},
        {"forwarded": "for=9.9.9.9"},
        {"via": "1.1 x"},
    ]
    async with client(app, peer="127.0.0.1", base="http://127.0.0.1") as http:
        for headers in forwarded:
            assert is_refusal(await http.get("/v1/models", headers=headers), 401)
    async with client(app, peer="10.0.0.9", base="http://127.0.0.1") as http:
        assert is_refusal(await http.get("/v1/models"), 401)
    async with client(app, peer="127.0.0.1", base="http://10.0.0.1") as http:
        assert is_refusal(await http.get("/v1/models"), 401)


async def test_open_to_all_is_open_but_not_to_pages_elsewhere(
    storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    app = build_app(
        with_http(
            storage,
            monkeypatch,
            tmp_path,
            host="0.0.0.0",
            open_to_all=True,
            allowed_hosts=["Kelvin.example"],
        )
    )
    async with client(app) as http:
        for host in ("10.0.0.1:8000", "kelvin", "kelvin.example", "[fe80::1]:8000"):
            answer = await http.post("/v1/generate", json=JOB, headers={"host": host})
            assert answer.status_code == 200, host
        for headers in (
            {"host": "evil.example"},
            {"origin": "https://evil.example"},
            {"sec-fetch-site": "cross-site"},
        ):
            assert is_refusal(await http.post("/v1/jobs", json=JOB, headers=headers), 403)
        behind_a_proxy = {"host": "10.0.0.1", "origin": "https://kelvin.example"}
        answer = await http.post("/v1/generate", json=JOB, headers=behind_a_proxy)
        assert answer.status_code == 200


async def test_a_browser_with_a_key_is_bound_to_its_own_page(pipeline: Pipeline, keys: FileKeys):
    app = build_app(pipeline)
    key, _ = await made(keys)
    async with client(app) as http:
        own = {"host": "kelvin.example", "origin": "https://kelvin.example"}
        answer = await http.post("/v1/jobs", json=JOB, headers=own, auth=("x", key))
        assert answer.status_code == 202
        foreign = {"host": "kelvin.example", "origin": "https://evil.example"}
        answer = await http.post("/v1/jobs", json=JOB, headers=foreign, auth=("x", key))
        assert is_refusal(answer, 403)


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
