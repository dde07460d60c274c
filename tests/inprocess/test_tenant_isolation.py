"""What is one tenant's is nobody else's, at any door: the app's own list of routes is gone through.

A door that is added is tried without a word here; one with a parameter or a body of a new kind is
tried with every id that there is.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import websockets.sync.client
from fastapi.routing import APIWebSocketRoute, iter_route_contexts
from websockets.exceptions import ConnectionClosed, InvalidStatus

from serve import key_ring
from serve.config import StorageSettings, load_settings
from serve.http import key_watch
from serve.http.native import build_app
from serve.key_store import FileKeys
from serve.keys import new_key
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline

MARK = "a prompt that nobody else may see"
CLIENT = "the-owners-page"
CHECKPOINT = "sd3.5_large.safetensors"
WORKFLOW = Path(__file__).parents[1] / "workflows" / "guide.json"
_WITHIN_S = 20.0


@pytest.fixture
def pipeline(
    keys: FileKeys, tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    # Said to listen to others: then everybody needs a key, whoever connects.
    file = {"file": str(tmp_path / "keys.json")}
    comfyui = {"checkpoints": {CHECKPOINT: "m"}}
    overrides = {"http": {"host": "0.0.0.0"}, "keys": file, "comfyui": comfyui}
    settings = load_settings(overrides=overrides)
    sections: dict[str, Any] = {name: getattr(settings, name) for name in overrides}
    return new_pipeline(StandIn(), storage, monkeypatch, **sections)


@pytest.fixture
def server(pipeline: Pipeline) -> Iterator[Served]:
    with served(pipeline) as running:
        yield running


def key_of(keys: FileKeys, tenant: str) -> str:
    key, record = new_key(tenant, ("generate",))
    asyncio.run(keys.add(record))
    return key


def client(server: Served, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=_WITHIN_S, trust_env=False)


def routes(pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    """Yield method and path of every HTTP route."""
    for context in iter_route_contexts(build_app(pipeline).routes):
        if not issubclass(type(context.original_route), APIWebSocketRoute):
            for method in sorted(context.methods or ()):
                yield method, str(context.path)


def sockets(pipeline: Pipeline) -> list[str]:
    """Return the path of every websocket."""
    return [
        str(context.path)
        for context in iter_route_contexts(build_app(pipeline).routes)
        if issubclass(type(context.original_route), APIWebSocketRoute)
    ]


def queries(paths: dict[str, Any], path: str, value: str) -> list[dict[str, str]]:
    """Return queries with a value in each of a route's parameters."""
    methods = paths.get(path.removeprefix("/api"), {})
    names = {
        parameter["name"]
        for operation in methods.values()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    }
    return [{}, *({name: value} for name in sorted(names))]


def bodies(value: str) -> list[dict[str, Any]]:
    """Return bodies that name a thing in every way that a door might take it."""
    named = ("id", "job_id", "prompt_id", "filename", "image", "name")
    return [
        {"delete": [value], "clear": True, **dict.fromkeys(named, value)},
        {"prompt": "x", "init_image": value, "init_images": [value]},
    ]


def prompt_of(http: httpx.Client) -> tuple[str, dict[str, Any]]:
    """Send a ComfyUI workflow, and return its id and what its history tells."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    graph["1"]["inputs"]["ckpt_name"] = CHECKPOINT
    graph["2"]["inputs"]["text"] = MARK
    graph["4"]["inputs"] |= {"width": 64, "height": 64}
    sent = http.post("/prompt", json={"prompt": graph, "client_id": CLIENT})
    assert sent.status_code == 200, sent.text
    prompt_id = str(sent.json()["prompt_id"])
    deadline = time.monotonic() + _WITHIN_S
    while not (told := http.get(f"/history/{prompt_id}").json()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return prompt_id, told[prompt_id]


def state(storage: StorageSettings) -> dict[str, str]:
    """Return key -> ETag of all objects, but for what others make and what always changes."""

    async def listed() -> dict[str, str]:
        store = ObjectStore(storage)
        try:
            return await store.list_etags("")
        finally:
            store.close()

    mine = re.compile(r"^leases/|globex")
    return {key: etag for key, etag in asyncio.run(listed()).items() if not mine.search(key)}


def test_nobody_is_told_of_anothers_nor_changes_it(
    pipeline: Pipeline, server: Served, keys: FileKeys, storage: StorageSettings
):
    owner, other = key_of(keys, "acme"), key_of(keys, "globex")
    with client(server, owner) as http:
        made = http.post("/v1/generate", json={"prompt": MARK}).json()
        prompt_id, history = prompt_of(http)
    (image,) = made["images"]
    (output,) = history["outputs"].values()
    names = [each["filename"] for each in output["images"]]
    secrets = [MARK, image["sha256"], *names]
    before = state(storage)
    all_routes, documented = list(routes(pipeline)), build_app(pipeline).openapi()["paths"]
    tried = 0
    with client(server, other) as http:
        for value in (made["id"], prompt_id, *names, image["s3_uri"], CLIENT):
            for method, path in all_routes:
                filled = re.sub(r"\{[^}]*\}", quote(value, safe=""), path)
                for query in queries(documented, path, value):
                    for body in bodies(value) if method in ("POST", "PUT", "PATCH") else [None]:
                        answer = http.request(method, filled, params=query, json=body)
                        told = answer.text.replace(value, "")
                        asked = (method, filled, query, body)
                        assert not [each for each in secrets if each in told], asked
                        assert answer.status_code != 500, asked
                        tried += 1
    assert tried > 300
    after = state(storage)
    assert {key: after.get(key) for key in before} == before, "and nothing of it has changed"
    with client(server, owner) as http:
        assert http.get(f"/v1/jobs/{made['id']}").json()["result"]["images"][0]["sha256"]
        assert http.get(f"/history/{prompt_id}").json()[prompt_id]["outputs"] == history["outputs"]


def test_nobody_hears_what_anothers_page_is_sent(
    pipeline: Pipeline, server: Served, keys: FileKeys
):
    owner, other = key_of(keys, "acme"), key_of(keys, "globex")
    paths = sockets(pipeline)
    assert paths
    for path in paths:
        url = f"{server.url.replace('http', 'ws', 1)}{path}?clientId={CLIENT}"
        for key in (None, "guess", new_key("acme", ("admin",))[0]):
            with pytest.raises(InvalidStatus):
                websockets.sync.client.connect(url, additional_headers=bearer(key)).close()
        foreign = {**bearer(owner), "Origin": "https://evil.example"}
        with pytest.raises(InvalidStatus):
            websockets.sync.client.connect(url, additional_headers=foreign).close()
        with (
            websockets.sync.client.connect(url, additional_headers=bearer(other)) as stranger,
            websockets.sync.client.connect(url, additional_headers=bearer(owner)) as own,
            client(server, owner) as http,
        ):
            prompt_id, _ = prompt_of(http)
            assert prompt_id in str(heard(own)), "its owner is told"
            assert prompt_id not in str(heard(stranger))


def test_a_websocket_is_closed_when_its_key_is_revoked(
    pipeline: Pipeline, server: Served, keys: FileKeys, monkeypatch: pytest.MonkeyPatch
):
    for module in (key_ring, key_watch):
        monkeypatch.setattr(module, "REVOKED_WITHIN_S", 0.1)
    stays = key_of(keys, "acme")
    goes = {path: new_key("acme", ("generate",)) for path in sockets(pipeline)}
    for _, record in goes.values():
        asyncio.run(keys.add(record))
    for path, (key, record) in goes.items():
        url = f"{server.url.replace('http', 'ws', 1)}{path}?clientId={CLIENT}"
        with (
            websockets.sync.client.connect(url, additional_headers=bearer(key)) as socket,
            websockets.sync.client.connect(url, additional_headers=bearer(stays)) as other,
        ):
            heard(socket)
            asyncio.run(keys.remove(record.digest))
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(_WITHIN_S)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008
            heard(other)  # raises, were it closed too


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def heard(socket: websockets.sync.client.ClientConnection) -> list[Any]:
    """Return what a socket has been sent until it is silent."""
    messages: list[Any] = []
    while True:
        try:
            message = socket.recv(0.5)
        except TimeoutError:
            return messages
        messages.append(message if isinstance(message, bytes) else json.loads(message))
