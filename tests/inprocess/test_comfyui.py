"""ComfyUI's clients, unmodified, against a running server; and what only the door decides."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import websockets.sync.client
from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper
from comfy_api_simplified.exceptions import ComfyApiError
from comfy_toolkit import ComfyClient, ComfyExecutionError, ComfySubmitError
from PIL import Image

from deployments.payloads import StepProgress
from serve.access_settings import HttpSettings, KeySettings
from serve.comfyui_settings import ComfyuiSettings
from serve.config import PipelineSettings, StorageSettings
from serve.errors import StageFailed, StorageUnavailable
from serve.http import comfyui_door, comfyui_following, comfyui_prompts
from serve.key_store import FileKeys
from serve.keys import new_key
from serve.pictures import read_request
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from serve.sweep import Sweep
from tests.inprocess.real_stages import real_pipeline
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline

WORKFLOWS = Path(__file__).parents[1] / "workflows"
_ENDS_WITHIN_S = 20.0


def workflow(name: str = "guide", side: int | None = 64) -> dict[str, Any]:
    """Return a workflow, its pictures of a size that the stand-in's model has."""
    graph: dict[str, Any] = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if "batch_size" in node["inputs"] and side is not None:
            node["inputs"] |= {"width": side, "height": side}
    return graph


@pytest.fixture
def pipeline(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    names = {"sd3.5_large.safetensors": "m", "sd3.5_medium.safetensors": "m"}
    settings = ComfyuiSettings(checkpoints=names)
    return new_pipeline(stages, storage, monkeypatch, comfyui=settings)


@pytest.fixture
def server(pipeline: Pipeline) -> Iterator[Served]:
    with served(pipeline) as running:
        yield running


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=_ENDS_WITHIN_S) as client:
        yield client


def until(answer: Callable[[], Any], within_s: float = _ENDS_WITHIN_S) -> Any:
    """Return the first answer that is not empty."""
    deadline = time.monotonic() + within_s
    while not (found := answer()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def history(http: httpx.Client, prompt_id: str, within_s: float = _ENDS_WITHIN_S) -> Any:
    return until(lambda: http.get(f"/history/{prompt_id}").json(), within_s)[prompt_id]


def sent(http: httpx.Client, graph: Any, **more: Any) -> str:
    answer = http.post("/prompt", json={"prompt": graph, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt_id"])


def test_comfy_api_simplified_runs_unmodified(server: Served, stages: StandIn):
    api = ComfyApiWrapper(server.url)
    graph = ComfyWorkflowWrapper(str(WORKFLOWS / "large_triple_clip.json"))
    graph.set_node_param("EmptySD3LatentImage", "width", 64)
    graph.set_node_param("EmptySD3LatentImage", "height", 32)
    graph.set_node_param("Positive Prompt", "text", "a red circle")
    pictures = api.queue_and_wait_images(graph, "Save Image")
    ((name, picture),) = pictures.items()
    assert name.startswith("ComfyUI_")
    with Image.open(io.BytesIO(picture)) as image:
        assert json.loads(image.info["prompt"])["16"]["inputs"]["text"] == "a red circle"
    (job,) = stages.denoised
    assert (job.width, job.height, job.seed) == (64, 32, 714823937862231)
    assert api.get_queue() == {"queue_running": [], "queue_pending": []}
    assert "KSampler" in api.get_object_info()
    assert set(api.get_object_info("SaveImage")) == {"SaveImage"}
    assert api.get_embeddings() == []
    assert "comfyui_version" in api.get_system_stats()["system"]
    api.interrupt()
    graph.set_node_param("KSampler", "steps", 0)
    with pytest.raises(ComfyApiError, match="400"):
        api.queue_prompt(graph)


def test_comfy_toolkit_runs_unmodified(server: Served, stages: StandIn, tmp_path: Path):
    client = ComfyClient(server.url)
    assert client.is_online()
    steps: list[tuple[int, int]] = []
    nodes: list[str | None] = []
    result = client.submit_and_track(
        workflow(),
        on_progress=lambda step, total: steps.append((step, total)),
        on_node=nodes.append,
        overall_timeout=_ENDS_WITHIN_S,
    )
    assert steps == [(1, 2), (2, 2)]
    assert [node for node in nodes if node is not None] == ["2", "5", "6", "7"]
    (image,) = result["images"]
    assert client.save(image, tmp_path / "got.png").read_bytes().startswith(b"\x89PNG")
    assert client.queue_status() == {"running": 0, "pending": 0}
    stages.error = StageFailed("The stage failed.", field="prompt", allowed="another one")
    with pytest.raises(ComfyExecutionError) as caught:
        client.submit_and_track(workflow(), overall_timeout=_ENDS_WITHIN_S)
    assert "The stage failed. prompt: None. Allowed: another one." in caught.value.detail
    with pytest.raises(ComfySubmitError, match="KSamplerAdvanced"):
        client.submit(workflow() | {"6": {"class_type": "KSamplerAdvanced", "inputs": {}}})


def test_no_content_type_and_a_forms_are_taken(http: httpx.Client):
    body = json.dumps({"prompt": workflow()}).encode()
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        for path in ("/prompt", "/api/prompt"):
            assert http.post(path, content=body, headers=kind).status_code == 200


def test_pictures_carry_what_made_them_and_can_be_sent_again(http: httpx.Client):
    page = {"nodes": [{"id": 3, "title": "Büro 日本"}], "links": []}
    graph = workflow("from_a_saved_picture")
    graph["9"]["inputs"]["filename_prefix"] = "Büro/日本 %width%"
    entry = history(
        http, sent(http, graph, extra_data={"extra_pnginfo": {"workflow": page, "": 1}})
    )
    (image,) = entry["outputs"]["9"]["images"]
    assert image["subfolder"] == "Büro"
    assert image["filename"].startswith("日本 64_")
    picture = http.get("/view", params=image)
    assert "%E6%97%A5" in picture.headers["content-disposition"]
    assert picture.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(picture.content)) as opened:
        chunks = opened.info
    assert json.loads(chunks["workflow"]) == page
    assert json.loads(chunks["prompt"]) == graph
    assert read_request(picture.content).prompt == "a glass teapot, studio photograph"
    again = history(http, sent(http, json.loads(chunks["prompt"])))
    assert again["status"]["status_str"] == "success"
    small = http.get("/view", params=image | {"preview": "webp;50"})
    assert small.headers["content-type"] == "image/webp"
    assert http.get("/view", params={"filename": "../../etc/passwd"}).status_code == 404


def test_several_chains_are_several_jobs_of_one_prompt(
    http: httpx.Client, server: Served, stages: StandIn
):
    server.call(stages.gate.clear)
    prompt_id = sent(http, workflow("two_chains"))
    assert http.get(f"/history/{prompt_id}").json() == {}
    assert http.get("/prompt").json() == {"exec_info": {"queue_remaining": 1}}
    (item,) = until(lambda: http.get("/queue").json()["queue_running"])
    assert item[1] == prompt_id
    assert item[4] == ["12", "13", "22"]
    server.call(stages.gate.set)
    entry = history(http, prompt_id)
    kinds = {
        node: [each["type"] for each in shown["images"]] for node, shown in entry["outputs"].items()
    }
    assert kinds == {"12": ["output"], "13": ["temp"], "22": ["output"]}
    assert entry["status"]["completed"] is True
    assert {job.seed for job in stages.denoised} == {1, 2}
    listed = http.get("/history", params={"max_items": 1}).json()
    assert listed == {prompt_id: entry}


def test_one_chain_that_fails_leaves_the_others_pictures(http: httpx.Client, stages: StandIn):
    real = stages._decode
    failing = iter([True])

    async def decode(latents: Any) -> Any:
        if next(failing, False):
            raise StageFailed("No.", field="prompt", value="x", allowed="y")
        return await real(latents)

    stages._decode = decode  # type: ignore[method-assign]
    entry = history(http, sent(http, workflow("two_chains")))
    assert entry["status"]["status_str"] == "error"
    event, data = entry["status"]["messages"][-1]
    assert event == "execution_error"
    assert data["exception_type"] == "StageFailed"
    assert "prompt: 'x'. Allowed: y." in data["exception_message"]
    assert data["node_type"] == "KSampler"
    assert len(entry["outputs"]) in (1, 2)


def test_an_output_that_cannot_be_made_does_not_stop_the_rest(http: httpx.Client):
    graph = workflow("two_chains")
    graph["5"]["inputs"]["width"] = 64
    graph["23"] = graph["5"] | {"inputs": graph["5"]["inputs"] | {"width": 4096}}
    graph["20"]["inputs"]["latent_image"] = ["23", 0]
    answer = http.post("/prompt", json={"prompt": graph}).json()
    (told,) = answer["node_errors"].values()
    assert told["dependent_outputs"] == ["22"]
    assert told["errors"][0]["extra_info"]["field"] == "width"
    assert set(history(http, answer["prompt_id"])["outputs"]) == {"12", "13"}


def test_a_prompt_id_is_one_prompt_however_often_it_is_sent(http: httpx.Client, stages: StandIn):
    for _ in range(2):
        assert sent(http, workflow(), prompt_id="order-17") == "order-17"
    history(http, "order-17")
    assert sent(http, workflow(), prompt_id="order-17") == "order-17"
    assert len(stages.denoised) == 1
    other = workflow()
    other["5"]["inputs"]["seed"] = 2
    answer = http.post("/prompt", json={"prompt": other, "prompt_id": "order-17"})
    assert answer.status_code == 409
    assert answer.json()["error"]["extra_info"]["field"] == "prompt_id"
    wrongs: list[Any] = ["", "x" * 300, "é", {}, []]
    for wrong in wrongs:
        assert http.post("/prompt", json={"prompt": other, "prompt_id": wrong}).status_code == 400


def test_another_process_answers_for_what_it_never_saw(
    http: httpx.Client,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    prompt_id = sent(http, workflow("two_chains"), client_id="c")
    entry = history(http, prompt_id)
    other = new_pipeline(stages, storage, monkeypatch, comfyui=ComfyuiSettings())
    with served(other) as elsewhere, httpx.Client(base_url=elsewhere.url) as away:
        assert away.get(f"/history/{prompt_id}").json() == {prompt_id: entry}
        (image,) = entry["outputs"]["22"]["images"]
        assert away.get("/view", params=image).content == http.get("/view", params=image).content
        assert away.post("/history", json={"delete": [prompt_id]}).status_code == 200
    assert http.get(f"/history/{prompt_id}").json() == {}
    assert http.get("/history").json() == {}
    assert http.get("/view", params=image).status_code == 200


async def test_lists_go_beyond_what_a_store_lists_at_once(
    http: httpx.Client, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(comfyui_prompts, "_LISTED_AT_ONCE", 2)
    ids = [sent(http, workflow()) for _ in range(5)]
    for prompt_id in ids:
        history(http, prompt_id)
    assert list(http.get("/history").json()) == ids
    assert list(http.get("/history?offset=2&max_items=3").json()) == ids[:3]
    assert http.get("/history?offset=999999999").json() == {}
    assert http.get("/history?max_items=0").json() == {}


def test_interrupt_and_the_queue_cancel(http: httpx.Client, server: Served, stages: StandIn):
    for path, body in (
        ("/interrupt", {}),
        ("/interrupt", {"prompt_id": "p"}),
        ("/queue", {"delete": ["p"]}),
    ):
        server.call(stages.gate.clear)
        prompt_id = sent(http, workflow("two_chains"))
        until(lambda: http.get("/queue").json()["queue_running"])
        named = json.loads(json.dumps(body).replace('"p"', json.dumps(prompt_id)))
        assert http.post(path, json=named).status_code == 200
        entry = history(http, prompt_id)
        event, data = entry["status"]["messages"][-1]
        assert (event, data["node_type"]) == ("execution_interrupted", "KSampler")
        assert entry["outputs"] == {}
        server.call(stages.gate.set)
    assert http.post("/queue", json={"delete": "p"}).status_code == 400
    assert http.post("/interrupt", content=b"").status_code == 200


def received(
    url: str,
    client: str,
    graph: Any,
    http: httpx.Client,
    on_preview: Callable[[], Any] = lambda: None,
    **more: Any,
) -> list[Any]:
    """Return all that a client's websocket hears of one prompt, and of the queue after it."""
    address = f"{url.replace('http', 'ws')}/ws?clientId={client}"
    heard: list[Any] = []
    with websockets.sync.client.connect(address, open_timeout=_ENDS_WITHIN_S) as socket:
        heard.append(json.loads(socket.recv(_ENDS_WITHIN_S)))
        prompt_id = sent(http, graph, client_id=client, **more)
        while heard[-1] != end(prompt_id):
            message = socket.recv(_ENDS_WITHIN_S)
            heard.append(message if isinstance(message, bytes) else json.loads(message))
            if isinstance(message, bytes):
                on_preview()
        # How many are left is told last.
        heard.append(json.loads(socket.recv(_ENDS_WITHIN_S)))
    return heard


def end(prompt_id: str) -> dict[str, Any]:
    return {"type": "executing", "data": {"node": None, "prompt_id": prompt_id}}


def test_the_websocket_tells_what_happens(http: httpx.Client, server: Served, stages: StandIn):
    preview = np.zeros((8, 8, 3), np.uint8)
    stages.steps = [StepProgress(1, 2, 0.1, preview=preview), StepProgress(2, 2, 0.1)]
    server.call(stages.gate.clear)
    heard = received(
        server.url,
        "a",
        workflow(),
        http,
        on_preview=lambda: server.call(stages.gate.set),
        extra_data={"preview_method": "auto"},
    )
    first = heard[0]
    assert first["data"]["status"] == {"exec_info": {"queue_remaining": 0}}
    assert first["data"]["sid"] == "a"
    told = [each["type"] for each in heard if isinstance(each, dict) and each["type"] != "status"]
    assert told == [
        "execution_start",
        "execution_cached",
        "executing",
        "executing",
        "progress",
        "progress",
        "executing",
        "executing",
        "executed",
        "execution_success",
        "executing",
    ]
    (picture,) = [each for each in heard if isinstance(each, bytes)]
    assert struct.unpack(">II", picture[:8]) == (1, 1)
    with Image.open(io.BytesIO(picture[8:])) as image:
        assert (image.format, image.size) == ("JPEG", (8, 8))
    (executed,) = [each for each in heard if isinstance(each, dict) and each["type"] == "executed"]
    assert http.get("/view", params=executed["data"]["output"]["images"][0]).status_code == 200
    remaining = [
        each["data"]["status"]["exec_info"]["queue_remaining"]
        for each in heard
        if isinstance(each, dict) and each["type"] == "status"
    ]
    assert (remaining[0], remaining[-1]) == (0, 0)


def test_the_end_is_told_once_the_store_knows_of_it(
    http: httpx.Client,
    server: Served,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(comfyui_following, "_ASKED_AGAIN_S", 0.05)
    real, refusals = pipeline.events, iter([True, True])

    async def cut_short(job_id: str, tenant: str) -> Any:
        async for event in real(job_id, tenant):
            if event.event == "decode":
                return  # as if the process were to go, and left the job to another one
            yield event

    async def away(job_id: str, tenant: str) -> Any:
        if next(refusals, False):
            raise StorageUnavailable("The store is away.")
        return await Pipeline.job(pipeline, job_id, tenant)

    monkeypatch.setattr(pipeline, "events", cut_short)
    monkeypatch.setattr(pipeline, "job", away)
    heard = received(server.url, "a", workflow(), http)
    kinds = [each["type"] for each in heard]
    assert kinds.count("executed") == kinds.count("execution_success") == 1


def test_who_asks_for_no_previews_gets_none(http: httpx.Client, server: Served, stages: StandIn):
    heard = received(server.url, "a", workflow(), http)
    assert not [each for each in heard if isinstance(each, bytes)]
    assert stages.denoised[0].preview_every == 0


def test_save_image_websocket_sends_the_pictures(http: httpx.Client, server: Served):
    heard = received(server.url, "a", workflow("batch_to_websocket", 16), http)
    pictures = [each for each in heard if isinstance(each, bytes)]
    assert len(pictures) == 4
    for picture in pictures:
        assert struct.unpack(">II", picture[:8]) == (1, 2)
        with Image.open(io.BytesIO(picture[8:])) as image:
            assert "prompt" in image.info


def test_a_failure_is_heard(http: httpx.Client, server: Served, stages: StandIn):
    stages.error = StageFailed("No.", field="prompt")
    heard = received(server.url, "a", workflow(), http)
    (error,) = [each["data"] for each in heard if each["type"] == "execution_error"]
    assert (error["node_id"], error["node_type"]) == ("5", "KSampler")
    assert error["exception_message"].startswith("No.")


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


def png(side: int = 32, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def uploaded(http: httpx.Client, name: str, data: bytes, **form: str) -> Any:
    answer = http.post("/upload/image", files={"image": (name, data)}, data=form)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_start_image_is_uploaded_by_name(
    server: Served, http: httpx.Client, stages: StandIn, tmp_path: Path
):
    (tmp_path / "house.png").write_bytes(png())
    kept = ComfyApiWrapper(server.url).upload_image(tmp_path / "house.png", "winter")
    assert kept == {"name": "house.png", "subfolder": "winter", "type": "input"}
    assert http.get("/view", params={"filename": kept["name"], **kept}).content == png()
    graph = workflow("image_to_image")
    graph["10"]["inputs"]["image"] = "winter/house.png"
    entry = history(http, sent(http, graph))
    (job,) = stages.denoised
    assert (job.width, job.height, job.num_inference_steps) == (32, 32, 33)
    assert job.init is not None
    (image,) = entry["outputs"]["9"]["images"]
    graph["10"]["inputs"]["image"] = f"{image['filename']} [output]"
    assert history(http, sent(http, graph))["status"]["completed"]
    shown = http.get("/object_info/LoadImage").json()["LoadImage"]["input"]["required"]["image"]
    assert shown[0] == ["winter/house.png"]


def test_uploads_of_one_name_do_not_take_each_others_place(http: httpx.Client):
    assert uploaded(http, "a.png", png())["name"] == "a.png"
    assert uploaded(http, "a.png", png())["name"] == "a.png"
    assert uploaded(http, "a.png", png(colour="blue"))["name"] == "a (1).png"
    assert uploaded(http, "a.png", png(colour="blue"), overwrite="true")["name"] == "a.png"
    view = http.get("/view", params={"filename": "a.png", "type": "input"})
    assert view.content == png(colour="blue")


@pytest.mark.parametrize(
    ("name", "data", "form", "status"),
    [
        ("../a.png", png(), {}, 400),
        ("a.png", png(), {"subfolder": "../.."}, 400),
        ("a.png", b"<html>", {}, 400),
        ("x" * 300, png(), {}, 400),
    ],
)
def test_what_is_no_picture_with_a_name_is_refused(
    http: httpx.Client, name: str, data: bytes, form: dict[str, str], status: int
):
    answer = http.post("/upload/image", files={"image": (name, data)}, data=form)
    assert answer.status_code == status
    assert answer.json()["error"]["extra_info"]["field"] in ("image", "init_image")
    assert http.post("/upload/image", data={"image": "x"}).status_code in (400, 415)
    missing = http.get("/view", params={"filename": "nobody.png", "type": "input"})
    assert missing.status_code == 404


async def test_old_prompts_are_swept_and_young_ones_stay(
    http: httpx.Client, storage: StorageSettings
):
    prompt_id = await asyncio.to_thread(sent, http, workflow())
    await asyncio.to_thread(history, http, prompt_id)
    await asyncio.to_thread(uploaded, http, "a.png", png())
    store = ObjectStore(storage)
    day_s = 86_400.0
    young = await Sweep(store, store, 30 * day_s, time.time() + day_s).run()
    assert young.comfyui_records == 0
    assert (await asyncio.to_thread(http.get, f"/history/{prompt_id}")).json()
    old = await Sweep(store, store, 30 * day_s, time.time() + 31 * day_s).run()
    assert old.comfyui_records >= 3
    assert await store.list_keys("comfyui/") == []
    assert (await asyncio.to_thread(http.get, f"/history/{prompt_id}")).json() == {}
    store.close()


def test_a_websocket_hears_of_prompts_that_another_process_took(
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(comfyui_door, "_LOOKED_AGAIN_S", 0.05)
    two: dict[str, Any] = {
        "pipeline": PipelineSettings(num_replicas=2),
        "comfyui": ComfyuiSettings(),
    }
    with (
        served(new_pipeline(stages, storage, monkeypatch, **two)) as takes,
        served(new_pipeline(StandIn(), storage, monkeypatch, **two)) as tells,
        httpx.Client(base_url=takes.url) as http,
    ):
        takes.call(stages.gate.clear)
        before = sent(http, workflow(), client_id="a")
        address = f"{tells.url.replace('http', 'ws')}/ws?clientId=a"
        with websockets.sync.client.connect(address, open_timeout=_ENDS_WITHIN_S) as socket:
            first = json.loads(socket.recv(_ENDS_WITHIN_S))
            assert first["data"]["status"]["exec_info"]["queue_remaining"] == 1
            takes.call(stages.gate.set)
            after = sent(http, workflow(), client_id="a")
            awaited = [end(before), end(after)]
            heard: list[Any] = []
            while not all(message in heard for message in awaited):
                heard.append(json.loads(socket.recv(_ENDS_WITHIN_S)))
        kinds = [each["type"] for each in heard]
        assert kinds.count("executed") == kinds.count("execution_success") == 2


def test_a_published_guides_workflow_runs_as_it_is(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = real_pipeline("pico", storage, monkeypatch)
    with served(pipeline) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        entry = history(http, sent(http, workflow(side=None)), within_s=110)
        assert entry["status"]["completed"] is True
        (image,) = entry["outputs"]["7"]["images"]
        assert image["filename"].startswith("kelvin_")
        with Image.open(io.BytesIO(http.get("/view", params=image).content)) as picture:
            assert picture.size == (1024, 1024)
            assert json.loads(picture.info["prompt"]) == workflow(side=None)


async def test_no_tenant_sees_anothers_prompts_or_pictures(
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    file = tmp_path / "keys.json"
    keys = {tenant: new_key(tenant, ("generate",)) for tenant in ("acme", "globex")}
    for _, record in keys.values():
        await FileKeys(file).add(record)
    sections: dict[str, Any] = {
        "http": HttpSettings(host="0.0.0.0"),
        "keys": KeySettings(file=str(file)),
    }
    with served(new_pipeline(stages, storage, monkeypatch, **sections)) as running:

        def client(tenant: str) -> httpx.Client:
            # In the path, for clients that can set a URL alone; their websockets too.
            return httpx.Client(base_url=f"{running.url}/k/{keys[tenant][0]}/", timeout=20)

        def asked() -> None:
            with client("acme") as own, client("globex") as other:
                prompt_id = sent(own, workflow(), prompt_id="p")
                entry = history(own, prompt_id)
                (image,) = entry["outputs"]["7"]["images"]
                uploaded(own, "a.png", png())
                for path in (f"/history/{prompt_id}", "/history"):
                    assert other.get(path).json() == {}
                assert other.get("/view", params=image).status_code == 404
                held = {"filename": "a.png", "type": "input"}
                assert own.get("/view", params=held).status_code == 200
                assert other.get("/view", params=held).status_code == 404
                graph = workflow("image_to_image")
                graph["4"] = graph["14"] | {"inputs": {"ckpt_name": "m.safetensors"}}
                for node in graph.values():
                    node["inputs"] |= {
                        name: ["4", link[1]]
                        for name, link in node["inputs"].items()
                        if isinstance(link, list) and link[0] == "14"
                    }
                del graph["14"]
                for name in ("a.png", f"{image['filename']} [output]"):
                    graph["10"]["inputs"]["image"] = name
                    assert own.post("/prompt", json={"prompt": graph}).status_code == 200
                    refused = other.post("/prompt", json={"prompt": graph})
                    assert list(refused.json()["node_errors"]) == ["10"]
                other.post("/history", json={"delete": [prompt_id]})
                other.post("/queue", json={"delete": [prompt_id]})
                assert own.get(f"/history/{prompt_id}").json() == {prompt_id: entry}
                # The same id is another prompt of theirs, not a conflict that tells of this one.
                changed = workflow()
                changed["5"]["inputs"]["seed"] = 2
                assert sent(other, changed, prompt_id="p") == "p"
                address = f"{running.url.replace('http', 'ws')}/k/{keys['globex'][0]}/ws"
                with websockets.sync.client.connect(f"{address}?clientId=c") as socket:
                    history(own, sent(own, workflow(), client_id="c"))
                    mine = sent(other, changed, client_id="c", prompt_id="q")
                    heard: list[Any] = []
                    while end(mine) not in heard:
                        heard.append(json.loads(socket.recv(_ENDS_WITHIN_S)))
                    told = {each["data"].get("prompt_id", mine) for each in heard}
                    assert told == {mine}
            with httpx.Client(base_url=running.url) as nobody:
                refused = nobody.post("/prompt", json={"prompt": workflow()})
                assert refused.status_code == 401
                assert refused.json()["error"]["type"] == "unauthenticated"

        await asyncio.to_thread(asked)
