"""Lists, and errors in ComfyUI's shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import websockets.sync.client

from serve.config import StorageSettings
from serve.http import comfyui_prompts
from serve.job_ids import shard
from serve.storage import ObjectStore
from tests.inprocess.comfyui.caller import ENDS_WITHIN_S, history, sent, until, workflow
from tests.inprocess.served import Served
from tests.inprocess.stand_in_stages import StandIn

BAD: dict[str, tuple[str, Any, str]] = {
    "no prompt": ("/prompt", {}, "no_prompt"),
    "no object": ("/prompt", [], "invalid_request"),
    "no JSON": ("/prompt", b"{", "invalid_request"),
    "lone surrogate": ("/prompt", b'{"prompt": {"1": "\\ud800"}}', "invalid_request"),
    "a page's workflow": ("/prompt", {"prompt": {"nodes": [], "links": []}}, "invalid_prompt"),
    "an unknown node": (
        "/prompt",
        {"prompt": {"1": {"class_type": "Foo", "inputs": {}}}},
        "missing_node_type",
    ),
}


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize("levels", [230, 400, 900])
def test_what_could_not_be_read_again_is_not_written_down(http: httpx.Client, levels: int):
    for extra in ({"extra_data": nested(levels)}, {"prompt": workflow() | {"x": nested(levels)}}):
        refused = http.post("/prompt", json={"prompt": workflow(), **extra})
        assert refused.status_code == 400, extra.keys()
        assert refused.json()["error"]["extra_info"]["field"] == "body"
    assert http.get("/queue").json() == {"queue_running": [], "queue_pending": []}
    assert http.get("/v1/jobs").json()["jobs"] == []


def test_what_is_nested_as_deeply_as_may_be_is_read_again(http: httpx.Client):
    prompt_id = sent(http, workflow(), extra_data=nested(150))
    assert history(http, prompt_id)["prompt"][3]["a"] == nested(149)


@pytest.mark.parametrize(("path", "body", "kind"), BAD.values(), ids=list(BAD))
def test_bad_input_has_comfyuis_shape(http: httpx.Client, path: str, body: Any, kind: str):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = http.post(path, content=content)
    assert answer.status_code == 400
    told = answer.json()
    assert told.keys() == {"error", "node_errors"}
    assert told["error"].keys() == {"type", "message", "details", "extra_info"}
    assert told["error"]["type"] == kind


def test_a_full_service_says_when_to_come_back(http: httpx.Client, server: Served, stages: StandIn):
    server.call(stages.gate.clear)
    answers = [http.post("/prompt", json={"prompt": workflow("two_chains")}) for _ in range(4)]
    refused = answers[-1]
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "overloaded"
    assert int(refused.headers["retry-after"]) > 0
    # What of the refused ones was accepted already is cancelled: none is half made.
    taken = [each.json()["prompt_id"] for each in answers if each.status_code == 200]
    waiting = until(lambda: http.get("/queue").json())
    assert [item[1] for item in waiting["queue_running"] + waiting["queue_pending"]] == taken
    server.call(stages.gate.set)
    for prompt_id in taken:
        assert history(http, prompt_id)["status"]["completed"]
    jobs = http.get("/v1/jobs").json()["jobs"]
    assert {job["status"] for job in jobs} <= {"succeeded", "cancelled"}


def test_lists_say_what_is_there(http: httpx.Client):
    shown = http.get("/object_info").json()
    checkpoints = shown["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    assert checkpoints[:2] == ["m.safetensors", "stable-diffusion-3.5-fp8.safetensors"]
    assert http.get("/models/checkpoints").json() == checkpoints
    assert "checkpoints" in http.get("/api/models").json()
    assert http.get("/models/nothing").status_code == 404
    assert http.get("/object_info/Nothing").json() == {}


def test_lists_go_beyond_what_a_store_lists_at_once(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comfyui_prompts, "_LISTED_AT_ONCE", 2)
    ids = [sent(http, workflow()) for _ in range(5)]
    for prompt_id in ids:
        history(http, prompt_id)
    assert list(http.get("/history").json()) == ids
    assert list(http.get("/history?offset=2&max_items=3").json()) == ids[:3]
    assert http.get("/history?offset=999999999").json() == {}
    assert http.get("/history?max_items=0").json() == {}


def test_large_histories_are_told_in_parts(http: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_prompts, "MOST_BYTES_LISTED", 100_000)
    monkeypatch.setattr(comfyui_prompts, "_AT_ONCE", 2)
    ids = [sent(http, workflow(), extra_data={"x": "x" * 60_000}) for _ in range(5)]
    for prompt_id in ids:
        history(http, prompt_id)
    assert list(http.get("/history").json()) == ids[3:]
    assert list(http.get("/history?offset=2").json()) == ids[1:3]
    assert http.post("/history", json={"clear": True}).status_code == 200
    assert http.get("/history").json() == {}


async def test_a_damaged_record_does_not_hide_the_others(
    http: httpx.Client, storage: StorageSettings
):
    ids = [sent(http, workflow(), prompt_id=name) for name in ("a", "b")]
    for prompt_id in ids:
        history(http, prompt_id)
    store = ObjectStore(storage)
    lost_job = http.get("/v1/jobs").json()["jobs"][0]["id"]
    key = f"jobs/{lost_job}/request.json"
    record, _, _ = (await store.get(key) or b"").partition(b"\n")
    await store.put(key, record + b"\n{}", "application/json")
    store.close()
    (left,) = http.get("/history").json()
    assert left in ids
    assert http.get("/queue").status_code == 200
    (lost,) = set(ids) - {left}
    assert http.get(f"/history/{lost}").json()["error"]["type"] == "record_unreadable"


def test_head_is_answered_as_get_is_but_without_a_body(http: httpx.Client):
    entry = history(http, sent(http, workflow()))
    (image,) = entry["outputs"]["7"]["images"]
    (job,) = http.get("/v1/jobs").json()["jobs"]
    for path, query in [
        ("/view", image),
        (f"/v1/jobs/{job['id']}/images/0", {}),
        ("/healthz", {}),
        ("/prompt", {}),
        ("/v1/jobs/unknown", {}),
    ]:
        asked = [http.request(method, path, params=query) for method in ("GET", "HEAD")]
        assert len({answer.status_code for answer in asked}) == 1
        assert len({answer.headers["content-length"] for answer in asked}) == 1
        assert asked[1].content == b""
    assert http.head("/v1/generate").status_code == 405


async def test_a_damaged_job_does_not_hide_other_prompts(
    http: httpx.Client, server: Served, storage: StorageSettings
):
    history(http, sent(http, workflow(), prompt_id="a"))
    (job,) = http.get("/v1/jobs").json()["jobs"]
    history(http, sent(http, workflow(), prompt_id="b"))
    store = ObjectStore(storage)
    await store.put(f"jobs/{job['id']}/result.json", b"{}", "application/json")
    for each in http.get("/v1/jobs").json()["jobs"] + [job]:
        # As if whoever ended it had died before it was pending no more.
        await store.put(f"pending/{shard(each['id'])}/{each['id']}", b"{}", "application/json")
    store.close()
    assert http.get("/queue").json() == {"queue_running": [], "queue_pending": []}
    with websockets.sync.client.connect(f"{server.url.replace('http', 'ws')}/ws") as socket:
        assert json.loads(socket.recv(ENDS_WITHIN_S))["type"] == "status"
    told = http.get("/history").json()
    assert [told[name]["status"]["completed"] for name in ("a", "b")] == [False, True]
    assert http.post("/history", json={"clear": True}).status_code == 200
    assert http.get("/history").json() == {}
