"""ComfyUI's clients, unmodified, against a running service."""

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

from tests.inprocess.comfyui.caller import ENDS_WITHIN_S, WORKFLOWS, png, workflow
from tests.inprocess.local_service import Service


def test_comfy_api_simplified_runs_unmodified(service: Service, tmp_path: Path):
    key = service.key()
    api = ComfyApiWrapper(service.url, user="anybody", password=key)
    graph = ComfyWorkflowWrapper(str(WORKFLOWS / "large_triple_clip.json"))
    graph.set_node_param("EmptySD3LatentImage", "width", 96)
    graph.set_node_param("EmptySD3LatentImage", "height", 64)
    graph.set_node_param("Positive Prompt", "text", "a red circle")
    pictures = api.queue_and_wait_images(graph, "Save Image")
    ((name, picture),) = pictures.items()
    assert name.startswith("ComfyUI_")
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (96, 64)
        assert json.loads(image.info["prompt"])["16"]["inputs"]["text"] == "a red circle"
    with service.as_tenant(key) as http:
        (job,) = http.get("/v1/jobs").json()["jobs"]
    assert job["request"]["prompt"] == "a red circle"
    assert job["request"]["seed"] == 714823937862231
    assert api.get_queue() == {"queue_running": [], "queue_pending": []}
    assert "KSampler" in api.get_object_info()
    assert set(api.get_object_info("SaveImage")) == {"SaveImage"}
    assert api.get_embeddings() == []
    assert "comfyui_version" in api.get_system_stats()["system"]
    api.interrupt()
    graph.set_node_param("KSampler", "steps", 0)
    with pytest.raises(ComfyApiError, match="400"):
        api.queue_prompt(graph)
    (tmp_path / "house.png").write_bytes(png(96))
    kept = api.upload_image(tmp_path / "house.png", "winter")
    assert kept == {"name": "house.png", "subfolder": "winter", "type": "input"}
    start = workflow("image_to_image")
    start["10"]["inputs"]["image"] = "winter/house.png"
    winter = ComfyWorkflowWrapper(start)
    for node in winter.values():
        node.setdefault("_meta", {"title": node["class_type"]})
    ((name, picture),) = api.queue_and_wait_images(winter, "SaveImage").items()
    assert name.startswith("winter_")
    with Image.open(io.BytesIO(picture)) as image:
        assert image.size == (96, 96)


def test_comfy_toolkit_runs_unmodified(service: Service, tmp_path: Path):
    client = ComfyClient(service.url_of(service.key()))
    assert client.is_online()
    steps: list[tuple[int, int]] = []
    nodes: list[str | None] = []
    result = client.submit_and_track(
        workflow(),
        on_progress=lambda step, total: steps.append((step, total)),
        on_node=nodes.append,
        overall_timeout=ENDS_WITHIN_S,
    )
    assert steps == sorted(steps)
    assert (len(steps) > 1, steps[-1]) == (True, (20, 20))
    assert [node for node in nodes if node is not None] == ["2", "5", "6", "7"]
    (image,) = result["images"]
    assert client.save(image, tmp_path / "got.png").read_bytes().startswith(b"\x89PNG")
    assert client.queue_status() == {"running": 0, "pending": 0}
    with pytest.raises(ComfySubmitError, match="KSamplerAdvanced"):
        client.submit(workflow() | {"6": {"class_type": "KSamplerAdvanced", "inputs": {}}})


def test_comfy_toolkit_interrupts_what_it_has_begun(service: Service):
    client = ComfyClient(service.url_of(service.key()))
    long = workflow(side=256)
    long["5"]["inputs"]["steps"] = 200
    with pytest.raises(ComfyExecutionError) as caught:
        client.submit_and_track(
            long, on_progress=lambda *_: client.interrupt(), overall_timeout=ENDS_WITHIN_S
        )
    assert "KSampler" in caught.value.detail
    entry = client.history(caught.value.prompt_id) or {}
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    assert entry["outputs"] == {}


def test_no_content_type_and_a_forms_are_taken(http: httpx.Client):
    body = json.dumps({"prompt": workflow()}).encode()
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        for path in ("/prompt", "/api/prompt"):
            assert http.post(path, content=body, headers=kind).status_code == 200
