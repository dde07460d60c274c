"""webuiapi, unmodified, against the AUTOMATIC1111 door of a running service."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import webuiapi
from PIL import Image

from tests.inprocess.local_service import LORAS, Service

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "sampler_name": "Euler"}


@pytest.fixture(scope="module")
def key(service: Service) -> str:
    return service.key()


@pytest.fixture
def api(service: Service, key: str) -> webuiapi.WebUIApi:
    where = urlsplit(service.url)
    return webuiapi.WebUIApi(host=where.hostname, port=where.port, username="anybody", password=key)


@pytest.fixture
def http(service: Service, key: str) -> Iterator[httpx.Client]:
    with service.as_tenant(key) as client:
        yield client


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def jobs_of(http: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get("/v1/jobs").json()["jobs"]
    return found


def test_pictures_come_with_their_parameters(api: webuiapi.WebUIApi, http: httpx.Client):
    result = api.txt2img(
        prompt="a cat, (dark:1.2) <lora:styles/film:0.5>",
        negative_prompt="blue",
        seed=7,
        cfg_scale=3,
        scheduler="SGM Uniform",
        batch_size=2,
        n_iter=2,
        **SMALL,
    )
    assert [image.size for image in result.images] == [(64, 64)] * 4
    assert result.info["all_seeds"] == [7, 8, 9, 10]
    assert result.info["batch_size"] == 2
    assert result.parameters["steps"] == 2
    job = jobs_of(http)[0]
    made = job["request"]
    assert (made["prompt"].strip(), made["negative_prompt"]) == ("a cat, (dark:1.2)", "blue")
    assert made["guidance_scale"] == 3.0
    assert made["loras"] == [{"name": "styles/film", "weight": 0.5}]
    assert result.images[1].info["parameters"] == result.info["infotexts"][1]
    prompt, negative, told = result.info["infotexts"][1].split("\n")
    assert prompt.split() == ["a", "cat,", "(dark:1.2)", "<lora:styles/film:0.5>"]
    assert (negative, told) == (
        "Negative prompt: blue",
        "Steps: 2, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 3, Seed: 8, "
        "Size: 64x64, Model: pico, Shift: 3, Version: Kelvin",
    )


def test_a_picture_to_start_from(api: webuiapi.WebUIApi, http: httpx.Client):
    start = Image.new("RGB", (128, 64), "red")
    result = api.img2img([start], prompt="a", **SMALL | {"steps": 4}, denoising_strength=0.5)
    assert result.image.size == (64, 64)
    assert result.info["denoising_strength"] == 0.5
    assert "Denoising strength: 0.5" in result.image.info["parameters"]
    job = jobs_of(http)[0]
    assert job["request"]["strength"] == 0.5
    assert job["request"]["init_image"].endswith(f"{job['id']}/input.png")
    assert "init_images" not in result.parameters


@pytest.mark.parametrize("images", [None, [], "a", ["a", "b"], ["http://other/a.png"], ["!"]])
def test_what_is_no_picture_to_start_from(http: httpx.Client, images: Any):
    body = {"prompt": "a", "init_images": images}
    answer = http.post("/sdapi/v1/img2img", json=body)
    assert (answer.status_code, answer.json()["field"]) == (400, "init_images"), answer.text


def test_a_body_may_leave_everything_to_the_model(http: httpx.Client):
    body = {"prompt": "a", "bogus": 1, "override_settings": {"unheard_of": 2}}
    answer = http.post("/sdapi/v1/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    told = json.loads(answer.json()["info"])
    assert (told["width"], told["sampler_name"]) == (64, "Euler")
    assert [each.split("'")[1] for each in told["warnings"]] == ["bogus", "unheard_of"]
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("wrong", "status", "field"),
    [
        ({"prompt": "  "}, 400, "prompt"),
        ({"sampler_name": "UniPC"}, 400, "sampler_name"),
        ({"scheduler": "Karras"}, 400, "scheduler"),
        ({"steps": 0}, 400, "steps"),
        ({"cfg_scale": "much"}, 400, "cfg_scale"),
        ({"width": 17}, 400, "width"),
        ({"width": 4096}, 400, "width"),
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
def test_bad_input_is_told_in_the_web_uis_words(http: httpx.Client, wrong: Any, status, field):
    body = {"prompt": "a"} | wrong if isinstance(wrong, dict) else wrong
    answer = http.post("/sdapi/v1/txt2img", json=body)
    told = answer.json()
    assert (answer.status_code, told["field"].split(".0")[0]) == (status, field), told
    assert told["allowed"]
    assert told["allowed"] in told["errors"]


@pytest.mark.parametrize("field", ["sampler_name", "scheduler"])
def test_an_error_does_not_repeat_a_megabyte(http: httpx.Client, field: str):
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "a", field: "x" * 1_000_000})
    assert (answer.status_code, answer.json()["field"]) == (400, field)
    assert len(answer.text) < 20_000


def test_the_client_raises_what_was_wrong(api: webuiapi.WebUIApi):
    with pytest.raises(RuntimeError, match="multiple of 16"):
        api.txt2img(prompt="a", **SMALL | {"width": 17})


def test_progress_then_interrupt(api: webuiapi.WebUIApi):
    idle = api.get_progress()
    assert (idle["progress"], idle["state"]["job_count"]) == (0.0, 0)
    long = {"steps": 200, "width": 256, "height": 256, "n_iter": 4}
    with ThreadPoolExecutor() as pool:
        making = pool.submit(api.txt2img, prompt="a", **SMALL | long)
        until(lambda: api.get_progress()["current_image"] is not None)
        told = api.get_progress()
        with Image.open(io.BytesIO(base64.b64decode(told["current_image"]))) as preview:
            assert preview.size == (32, 32)
        assert 0 < told["progress"] < 1
        assert told["eta_relative"] > 0
        assert 0 < told["state"]["sampling_step"] <= told["state"]["sampling_steps"] == 200
        api.interrupt()
        with pytest.raises(RuntimeError, match="cancelled"):
            making.result(30)
    api.util_wait_for_ready(check_interval=0.05)


def test_jobs_under_way_are_seen_behind_those_that_ended(
    http: httpx.Client, api: webuiapi.WebUIApi
):
    long = {"prompt": "a", "width": 256, "height": 256, "num_inference_steps": 200, "num_images": 4}
    job = http.post("/v1/jobs", json=long).json()["id"]
    for seed in range(21):
        http.post("/v1/generate", json={"prompt": "a", "num_inference_steps": 1, "seed": seed})
    told = api.get_progress()
    assert told["state"]["job"] == job
    assert told["progress"] > 0
    api.interrupt()
    until(lambda: http.get(f"/v1/jobs/{job}").json()["status"] == "cancelled")
    assert api.get_progress()["progress"] == 0.0


def test_what_there_is_to_choose_from(api: webuiapi.WebUIApi):
    assert api.util_get_sampler_names() == ["DPM++ 2M", "DPM++ 2M SDE", "Euler", "Euler a"]
    assert "automatic" in api.util_get_scheduler_names()
    assert api.util_get_model_names() == ["pico"]
    assert api.util_get_current_model() == "pico"
    api.util_set_model("pico")
    assert [lora["name"] for lora in api.get_loras()] == list(LORAS)
    assert api.get_cmd_flags() == {}


def test_options_are_not_kept(http: httpx.Client):
    refused = http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "other"})
    assert refused.status_code == 400
    assert refused.json()["field"] == "sd_model_checkpoint"
    assert "override_settings" in refused.json()["allowed"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (b'"subseed": "\\ud800"', "body"),
        (b'"nobody knows": {"a": ["\\udfff"]}', "body"),
        (b'"script_args": ' + b"[" * 280 + b"]" * 280, "body"),
        (b'"cfg_scale": 1' + b"0" * 400, "cfg_scale"),
        (b'"cfg_scale": -1' + b"0" * 400, "cfg_scale"),
    ],
)
def test_what_cannot_be_said_again_is_refused_before_it_is_made(
    http: httpx.Client, wrong: bytes, field: str
):
    before = [job["id"] for job in jobs_of(http)]
    body = b'{"prompt": "a", ' + wrong + b"}"
    refused = http.post("/sdapi/v1/txt2img", content=body)
    assert (refused.status_code, refused.json()["field"]) == (400, field)
    assert [job["id"] for job in jobs_of(http)] == before
