"""ComfyUI's clients, unmodified, against a running server."""

from __future__ import annotations

import io
import json
from pathlib import Path

import httpx
import pytest
from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper
from comfy_api_simplified.exceptions import ComfyApiError
from comfy_toolkit import ComfyClient, ComfyExecutionError, ComfySubmitError
from PIL import Image

from serve.config import StorageSettings
from serve.errors import StageFailed
from tests.inprocess.comfyui.caller import ENDS_WITHIN_S, WORKFLOWS, history, sent, workflow
from tests.inprocess.real_stages import real_pipeline
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import StandIn


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
        overall_timeout=ENDS_WITHIN_S,
    )
    assert steps == [(1, 2), (2, 2)]
    assert [node for node in nodes if node is not None] == ["2", "5", "6", "7"]
    (image,) = result["images"]
    assert client.save(image, tmp_path / "got.png").read_bytes().startswith(b"\x89PNG")
    assert client.queue_status() == {"running": 0, "pending": 0}
    stages.error = StageFailed("The stage failed.", field="prompt", allowed="another one")
    with pytest.raises(ComfyExecutionError) as caught:
        client.submit_and_track(workflow(), overall_timeout=ENDS_WITHIN_S)
    assert "The stage failed. prompt: None. Allowed: another one." in caught.value.detail
    with pytest.raises(ComfySubmitError, match="KSamplerAdvanced"):
        client.submit(workflow() | {"6": {"class_type": "KSamplerAdvanced", "inputs": {}}})


def test_no_content_type_and_a_forms_are_taken(http: httpx.Client):
    body = json.dumps({"prompt": workflow()}).encode()
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        for path in ("/prompt", "/api/prompt"):
            assert http.post(path, content=body, headers=kind).status_code == 200


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
