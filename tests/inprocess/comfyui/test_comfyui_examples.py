"""Every example workflow from end to end on a running service: accepted, heard, listed, seen."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.inprocess.comfyui.caller import (
    WORKFLOWS,
    history,
    png,
    received,
    reduced,
    sent,
    uploaded,
    workflow,
)
from tests.inprocess.local_service import Service

# Workflow -> size, and output node -> what the names of its pictures begin with, and how many.
MADE: dict[str, tuple[tuple[int, int], dict[str, tuple[str, int]]]] = {
    "guide": ((80, 80), {"7": ("output/kelvin_", 1)}),
    "from_a_saved_picture": ((96, 64), {"9": ("output/ComfyUI_", 1)}),
    "large_triple_clip": ((80, 80), {"9": ("output/ComfyUI_", 1)}),
    "large_turbo": ((80, 64), {"9": ("output/SD3.5/turbo_80x64_", 1)}),
    "medium_three_texts": ((64, 96), {"233": ("temp/ComfyUI_temp_", 1)}),
    "makers_negative_range": ((80, 80), {"233": ("temp/ComfyUI_temp_", 1)}),
    "split_files_tiled": ((112, 64), {"9": ("output/lighthouse_", 2)}),
    "loras": ((80, 80), {"9": ("output/ink_", 1)}),
    "primitives": ((64, 64), {"7": ("output/kites/first_", 1)}),
    "two_chains": (
        (80, 80),
        {"12": ("output/blue_", 1), "13": ("temp/ComfyUI_temp_", 1), "22": ("output/orange_", 1)},
    ),
    "image_to_image": ((96, 96), {"9": ("output/winter_", 1)}),
    "batch_to_websocket": ((64, 64), {}),
}


@pytest.fixture
def url(service: Service) -> str:
    return service.url_of(service.key())


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield client


def test_all_of_them_are_run():
    assert {file.stem for file in WORKFLOWS.iterdir()} == MADE.keys()


@pytest.mark.parametrize("name", MADE)
def test_a_workflow_runs(url: str, http: httpx.Client, name: str):
    graph = reduced(workflow(name, side=None))
    size, made = MADE[name]
    uploaded(http, "house.png", png(96))
    heard = received(url, name, graph, http)
    told = [each for each in heard if isinstance(each, dict)]
    (prompt_id,) = [
        each["data"]["prompt_id"] for each in told if each["type"] == "execution_success"
    ]
    executed = [each["data"]["node"] for each in told if each["type"] == "executed"]
    assert sorted(executed) == sorted(made)
    steps = [each["data"] for each in told if each["type"] == "progress"]
    assert steps[-1]["value"] == steps[-1]["max"]
    entry = history(http, prompt_id)
    assert entry["status"]["status_str"] == "success"
    assert {
        node: (named(shown["images"][0]), len(shown["images"]))
        for node, shown in entry["outputs"].items()
    } == made
    pictures = [
        http.get("/view", params=image).content
        for shown in entry["outputs"].values()
        for image in shown["images"]
    ]
    by_websocket = [each[8:] for each in heard if isinstance(each, bytes)]
    assert len(by_websocket) == (4 if name == "batch_to_websocket" else 0)
    for picture in pictures + by_websocket:
        with Image.open(io.BytesIO(picture)) as opened:
            assert opened.size == size
            assert json.loads(opened.info["prompt"]) == graph
    assert http.get("/queue").json() == {"queue_running": [], "queue_pending": []}


def named(image: dict[str, str]) -> str:
    """Return what stands before the job's id in a picture's name."""
    folders = "/".join(filter(None, (image["type"], image["subfolder"])))
    return f"{folders}/{image['filename'][: -len('0' * 32 + '_00001_.png')]}"


def test_loras_of_a_workflow_are_those_of_its_job(http: httpx.Client):
    history(http, sent(http, reduced(workflow("loras", side=None))))
    (job,) = http.get("/v1/jobs").json()["jobs"]
    assert job["request"]["loras"] == [
        {"name": "ink", "weight": 0.8},
        {"name": "styles/film", "weight": 0.5},
    ]


def test_a_published_guides_workflow_runs_as_it_is(http: httpx.Client):
    graph = workflow(side=None)
    prompt_id = sent(http, graph)
    queue = http.get("/queue").json()
    (item,) = queue["queue_running"] + queue["queue_pending"]
    assert item[1:3] == [prompt_id, graph]
    entry: Any = history(http, prompt_id, within_s=110)
    assert entry["status"]["completed"] is True
    (image,) = entry["outputs"]["7"]["images"]
    assert image["filename"].startswith("kelvin_")
    with Image.open(io.BytesIO(http.get("/view", params=image).content)) as picture:
        assert picture.size == (1024, 1024)
        assert json.loads(picture.info["prompt"]) == graph
