"""webuiapi, unmodified, against the AUTOMATIC1111 door."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from deployments.payloads import StepProgress
from tests.inprocess.served import Served
from tests.inprocess.stand_in_stages import StandIn

SMALL: dict[str, Any] = {"width": 16, "height": 16, "steps": 2, "sampler_name": "Euler"}


@pytest.fixture
def api(server: Served) -> webuiapi.WebUIApi:
    where = urlsplit(server.url)
    return webuiapi.WebUIApi(host=where.hostname, port=where.port)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_pictures_come_with_their_parameters(api: webuiapi.WebUIApi, stages: StandIn):
    result = api.txt2img(
        prompt="a cat, (dark:1.2)",
        negative_prompt="blue",
        seed=7,
        cfg_scale=3,
        scheduler="SGM Uniform",
        batch_size=2,
        n_iter=2,
        **SMALL,
    )
    assert [image.size for image in result.images] == [(16, 16)] * 4
    assert result.info["all_seeds"] == [7, 8, 9, 10]
    assert result.info["batch_size"] == 2
    assert result.parameters["steps"] == 2
    assert [job.prompt for job in stages.encoded] == ["a cat, (dark:1.2)", "blue"]
    assert stages.denoised[0].guidance_scale == 3.0
    assert result.images[1].info["parameters"] == result.info["infotexts"][1]
    assert result.info["infotexts"][1] == (
        "a cat, (dark:1.2)\nNegative prompt: blue\nSteps: 2, Sampler: Euler, "
        "Schedule type: SGM Uniform, CFG scale: 3, Seed: 8, Size: 16x16, Model: m, Shift: 3, "
        "Version: Kelvin"
    )


def test_a_picture_to_start_from(api: webuiapi.WebUIApi, stages: StandIn):
    start = Image.new("RGB", (32, 16), "red")
    small = {name: value for name, value in SMALL.items() if name != "steps"}
    result = api.img2img([start], prompt="a", steps=4, denoising_strength=0.5, **small)
    assert result.image.size == (16, 16)
    assert result.info["denoising_strength"] == 0.5
    assert "Denoising strength: 0.5" in result.image.info["parameters"]
    assert stages.denoised[0].strength == 0.5
    assert "init_images" not in result.parameters


@pytest.mark.parametrize("images", [None, [], "a", ["a", "b"], ["http://other/a.png"], ["!"]])
def test_what_is_no_picture_to_start_from(server: Served, images: Any):
    body = {"prompt": "a", "init_images": images}
    answer = httpx.post(f"{server.url}/sdapi/v1/img2img", json=body)
    assert (answer.status_code, answer.json()["field"]) == (400, "init_images"), answer.text


def test_a_body_may_leave_everything_to_the_model(server: Served):
    answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json={"prompt": "a", "bogus": 1})
    assert answer.status_code == 200, answer.text
    told = json.loads(answer.json()["info"])
    assert (told["width"], told["sampler_name"]) == (16, "Euler")
    assert "bogus" in told["warnings"][0]
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))) as image:
        assert image.size == (16, 16)


@pytest.mark.parametrize(
    ("wrong", "status", "field"),
    [
        ({"prompt": "  "}, 400, "prompt"),
        ({"sampler_name": "UniPC"}, 400, "sampler_name"),
        ({"scheduler": "Karras"}, 400, "scheduler"),
        ({"steps": 0}, 400, "steps"),
        ({"cfg_scale": "much"}, 400, "cfg_scale"),
        ({"width": 17}, 400, "width"),
        ({"width": 160}, 400, "width"),
        ({"batch_size": 0}, 400, "batch_size"),
        ({"batch_size": 4, "n_iter": 5}, 400, "n_iter"),
        ({"enable_hr": True}, 400, "enable_hr"),
        ({"subseed_strength": 0.5}, 400, "subseed_strength"),
        ({"alwayson_scripts": {"controlnet": {"args": []}}}, 400, "alwayson_scripts"),
        ({"prompt": "a <lora:none:0.5>"}, 400, "prompt"),
        ({"prompt": "a <lora:none:much>"}, 400, "prompt"),
        ({"prompt": "a <hypernet:none:1>"}, 400, "prompt"),
        (
            {"override_settings": {"sd_model_checkpoint": "other [0123abcd]"}},
            404,
            "override_settings.sd_model_checkpoint",
        ),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 2}},
            400,
            "override_settings.CLIP_stop_at_last_layers",
        ),
        ([], 400, "body"),
    ],
)
def test_bad_input_is_told_in_the_web_uis_words(server: Served, wrong: Any, status, field):
    body = {"prompt": "a"} | wrong if isinstance(wrong, dict) else wrong
    answer = httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body)
    told = answer.json()
    assert (answer.status_code, told["field"].split(".0")[0]) == (status, field), told
    assert told["allowed"]
    assert told["allowed"] in told["errors"]


def test_the_client_raises_what_was_wrong(api: webuiapi.WebUIApi):
    with pytest.raises(RuntimeError, match="multiple of 16"):
        api.txt2img(prompt="a", **SMALL | {"width": 17})


def test_progress_then_interrupt(api: webuiapi.WebUIApi, server: Served, stages: StandIn):
    pixels = np.full((2, 3, 3), 200, np.uint8)
    stages.steps = [StepProgress(1, 4, 0.1, preview=pixels), StepProgress(2, 4, 0.1)]
    stages.gate.clear()
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    with ThreadPoolExecutor() as pool:
        making = pool.submit(api.txt2img, prompt="a", **SMALL)
        until(lambda: api.get_progress()["current_image"] is not None)
        told = api.get_progress()
        with Image.open(io.BytesIO(base64.b64decode(told["current_image"]))) as preview:
            assert preview.size == (3, 2)
        assert told["progress"] == 0.25
        assert told["eta_relative"] > 0
        assert (told["state"]["sampling_step"], told["state"]["sampling_steps"]) == (1, 4)
        api.interrupt()
        with pytest.raises(RuntimeError, match="cancelled"):
            making.result(30)
    api.util_wait_for_ready(check_interval=0.05)


def test_what_there_is_to_choose_from(api: webuiapi.WebUIApi):
    assert api.util_get_sampler_names() == ["DPM++ 2M", "DPM++ 2M SDE", "Euler", "Euler a"]
    assert "automatic" in api.util_get_scheduler_names()
    assert api.util_get_model_names() == ["m"]
    assert api.util_get_current_model() == "m"
    api.util_set_model("m")
    assert [lora["name"] for lora in api.get_loras()] == ["bolt"]
    assert api.get_cmd_flags() == {}


def test_options_are_not_kept(server: Served):
    refused = httpx.post(f"{server.url}/sdapi/v1/options", json={"sd_model_checkpoint": "other"})
    assert refused.status_code == 400
    assert refused.json()["field"] == "sd_model_checkpoint"
    assert "override_settings" in refused.json()["allowed"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (b'"subseed": "\\ud800"', "body"),
        (b'"nobody knows": {"a": ["\\udfff"]}', "body"),
        (b'"cfg_scale": 1' + b"0" * 400, "cfg_scale"),
        (b'"cfg_scale": -1' + b"0" * 400, "cfg_scale"),
    ],
)
def test_what_cannot_be_said_again_is_refused_before_it_is_made(
    server: Served, stages: StandIn, wrong: bytes, field: str
):
    body = b'{"prompt": "a", ' + wrong + b"}"
    refused = httpx.post(f"{server.url}/sdapi/v1/txt2img", content=body)
    assert (refused.status_code, refused.json()["field"]) == (400, field)
    assert stages.denoised == []
