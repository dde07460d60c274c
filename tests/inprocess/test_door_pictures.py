"""What the doors' pictures show: the built-in model through each door, judged by the checker.

By each door's clients as they come from PyPI; what else they do is in the tests of their doors.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
import webuiapi
from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper
from comfy_toolkit import ComfyClient
from PIL import Image

from deployments.builtin.checker import check
from deployments.builtin.read import read_claims
from serve.config import StorageSettings, load_settings
from serve.requests import GenerateRequest
from tests.inprocess.comfyui.caller import WORKFLOWS, workflow
from tests.inprocess.local_service import listening

PROMPT = "a large red circle left of a small blue square"
OTHER = "a large red circle left of a small green square"
SIDE = 256
_MADE_WITHIN_S = 120.0


@pytest.fixture(scope="module")
def url(s3: StorageSettings) -> Iterator[str]:
    settings = load_settings(overrides={"model": {"path": "builtin"}})
    storage = s3.model_copy(update={"prefix": "door-pictures/"})
    with listening(settings.model_copy(update={"storage": storage})) as url:
        yield url


def test_openai_shows_what_was_asked_and_so_does_its_edit(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        with client.images.generate(
            prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 1}
        ) as stream:
            *partial, last = list(stream)
        picture = base64.b64decode(last.b64_json)
        assert shows(picture, PROMPT)
        assert not shows(picture, OTHER)
        assert GenerateRequest.model_validate_json(opened(picture).info["kelvin"]).seed == 1
        assert 1 <= len(partial) <= 3
        small = np.asarray(opened(picture).resize((32, 32)), float)
        distances = [distance(base64.b64decode(event.b64_json), small) for event in partial]
        assert distances[-1] < distances[0]
        edited = client.images.edit(
            image=picture, prompt=OTHER, extra_body={"seed": 1, "strength": 0.9}
        )
    assert edited.size == f"{SIDE}x{SIDE}"
    assert shows(base64.b64decode((edited.data or [])[0].b64_json or ""), OTHER)


def test_webuiapi_shows_what_was_asked(url: str):
    where = urlsplit(url)
    api = webuiapi.WebUIApi(host=where.hostname, port=where.port)
    result = api.txt2img(
        prompt=PROMPT, seed=1, steps=20, cfg_scale=4, width=SIDE, height=SIDE, sampler_name="Euler"
    )
    assert shows(result.image, PROMPT)
    assert not shows(result.image, OTHER)


def test_comfy_api_simplified_shows_what_was_asked(url: str):
    graph = ComfyWorkflowWrapper(str(WORKFLOWS / "guide.json"))
    for node in graph.values():
        node["_meta"] = {"title": node["class_type"]}
    graph["2"]["inputs"]["text"] = PROMPT
    graph["4"]["inputs"] |= {"width": SIDE, "height": SIDE}
    ((_, picture),) = ComfyApiWrapper(url).queue_and_wait_images(graph, "SaveImage").items()
    assert shows(picture, PROMPT)
    assert not shows(picture, OTHER)


def test_comfy_toolkit_shows_what_was_asked(url: str):
    client = ComfyClient(url)
    graph = workflow(side=SIDE)
    graph["2"]["inputs"]["text"] = PROMPT
    (image,) = client.submit_and_track(graph, overall_timeout=_MADE_WITHIN_S)["images"]
    picture = client.download(image)
    assert shows(picture, PROMPT)
    assert not shows(picture, OTHER)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def distance(preview: bytes, small: np.ndarray) -> float:
    assert opened(preview).size == (32, 32)
    return float(np.abs(np.asarray(opened(preview), float) - small).mean())


def shows(picture: bytes | Image.Image, prompt: str) -> bool:
    image = opened(picture) if isinstance(picture, bytes) else picture
    return check(np.asarray(image.convert("RGB")), read_claims(prompt)).all_right
