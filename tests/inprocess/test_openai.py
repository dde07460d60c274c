"""OpenAI's own client, unmodified, against the door for it.

Of a running service; on stand-in stages where a test must hold them up, or let them fail.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from deployments.payloads import StepProgress
from serve.errors import StageFailed
from serve.keys import new_key
from serve.pipeline import Pipeline
from tests.inprocess.local_service import Service
from tests.inprocess.served import Served, served
from tests.inprocess.stand_in_stages import REQUEST, StandIn

WAIT_S = 60


@pytest.fixture
def door(pipeline: Pipeline) -> Iterator[Served]:
    with served(pipeline) as server:
        yield server


@pytest.fixture(scope="module")
def key(service: Service) -> str:
    return service.key()


@pytest.fixture
def client(service: Service, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
def http(service: Service, key: str) -> Iterator[httpx.Client]:
    with service.as_tenant(key) as http:
        yield http


def job_of(http: httpx.Client, answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/v1/jobs/{answer.headers['x-kelvin-job-id']}").json()
    return found


def image_of(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def png(width: int = 64, height: int = 96) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_come_as_base64_with_everything_the_client_knows(
    client: openai.OpenAI, http: httpx.Client
):
    answer = client.images.with_raw_response.generate(
        prompt="four",
        n=2,
        size="96x64",
        output_format="webp",
        output_compression=80,
        quality="high",
        background="opaque",
        moderation="low",
        user="somebody",
        extra_body={
            "negative_prompt": "b",
            "num_inference_steps": 5,
            "guidance_scale": 3,
            "seed": 7,
            "sampler": "dpmpp_2m",
            "scheduler": "beta",
            "shift": 2.5,
        },
    )
    told = answer.parse()
    assert (told.size, told.output_format, told.background) == ("96x64", "webp", "opaque")
    assert told.created > 0
    assert told.usage is not None
    assert told.usage.output_tokens == 2 * 6 * 4
    assert told.usage.input_tokens == told.usage.input_tokens_details.text_tokens > 0
    assert told.usage.total_tokens == told.usage.input_tokens + told.usage.output_tokens
    assert told.data is not None
    pictures = [image_of(each.b64_json) for each in told.data]
    assert [(each.format, each.size) for each in pictures] == [("WEBP", (96, 64))] * 2
    job = job_of(http, answer)
    made = job["request"]
    assert (made["prompt"], made["negative_prompt"]) == ("four", "b")
    assert (made["num_inference_steps"], made["guidance_scale"]) == (5, 3.0)
    assert (made["sampler"], made["scheduler"], made["shift"]) == ("dpmpp_2m", "beta", 2.5)
    assert [image["seed"] for image in job["result"]["images"]] == [7, 8]
    assert made["preview_every"] == 0


def test_urls_lead_to_the_pictures_and_auto_is_the_models_size(
    client: openai.OpenAI, http: httpx.Client
):
    answer = client.images.with_raw_response.generate(
        prompt="a", size="auto", response_format="url", quality="auto", model="pico"
    )
    (image,) = answer.parse().data or []
    assert image.b64_json is None
    assert image.url is not None
    fetched = httpx.get(image.url, trust_env=False)
    assert Image.open(io.BytesIO(fetched.content)).size == (64, 64)
    assert job_of(http, answer)["status"] == "succeeded"


def test_a_stream_brings_previews_and_then_the_picture(door: Served, stages: StandIn):
    # Of eight steps, two previews: past a third and past two thirds.
    stages.steps = [
        StepProgress(step, 8, 0.1, preview=np.full((2, 2, 3), 20 * step, np.uint8))
        for step in range(1, 9)
    ]
    with (
        openai.OpenAI(base_url=f"{door.url}/v1", api_key="none") as client,
        client.images.generate(prompt="a", stream=True, partial_images=2) as stream,
    ):
        events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    shades = [float(np.asarray(image_of(event.b64_json)).mean()) for event in events[:2]]
    assert shades == pytest.approx([60, 120], abs=4)
    assert image_of(events[2].b64_json).size == (16, 16)
    assert events[2].usage.output_tokens == 1
    assert stages.denoised[0].preview_every == 1


def test_without_partial_images_a_stream_is_the_picture_alone(client: openai.OpenAI):
    with client.images.generate(prompt="a", stream=True) as stream:
        assert [event.type for event in stream] == ["image_generation.completed"]


async def test_the_asynchronous_client_streams_and_waits(service: Service, key: str):
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=key) as client:
        told, stream = await asyncio.gather(
            client.images.generate(prompt="a"),
            client.images.generate(prompt="b", stream=True),
        )
        events = [event.type async for event in stream]
    assert told.data is not None
    assert events == ["image_generation.completed"]


def test_an_edit_starts_from_its_image_at_that_ones_size(client: openai.OpenAI, http: httpx.Client):
    answer = client.images.with_raw_response.edit(
        image=png(),
        prompt="a",
        n=1,
        input_fidelity="high",
        extra_body={"strength": 0.25, "seed": 3, "num_inference_steps": 8},
    )
    told = answer.parse()
    assert told.size == "64x96"
    assert told.usage is not None
    assert told.usage.input_tokens_details.image_tokens == 4 * 6
    made = job_of(http, answer)["request"]
    assert (made["strength"], made["seed"]) == (0.25, 3)
    with client.images.edit(
        image=("a.png", png(), "image/png"), prompt="a", size="80x64", stream=True
    ) as stream:
        (event,) = stream
    assert event.type == "image_edit.completed"
    assert image_of(event.b64_json).size == (80, 64)


def test_an_edit_is_of_the_very_picture_that_was_sent(door: Served, stages: StandIn):
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="none") as client:
        client.images.edit(
            image=png(32, 48), prompt="a", extra_body={"strength": 0.25, "num_inference_steps": 8}
        )
    (job,) = stages.denoised
    assert job.steps == 2
    assert np.array_equal(stages.started[0], np.asarray(Image.open(io.BytesIO(png(32, 48)))))


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({"size": "10x16"}, "size", "invalid_request"),
        ({"size": "large"}, "size", "invalid_request"),
        ({"size": "\u0661\u0666x\u0661\u0666"}, "size", "invalid_request"),  # 16x16
        ({"size": "2048x2048"}, "size", "invalid_request"),
        ({"n": 17}, "n", "invalid_request"),
        ({"n": "2"}, "n", "invalid_request"),
        ({"output_format": "gif"}, "output_format", "invalid_request"),
        ({"output_compression": 101}, "output_compression", "invalid_request"),
        ({"quality": "best"}, "quality", "invalid_request"),
        ({"background": "transparent"}, "background", "not_supported_yet"),
        ({"response_format": "jpg"}, "response_format", "invalid_request"),
        ({"stream": True, "partial_images": 4}, "partial_images", "invalid_request"),
        ({"prompt": " "}, "prompt", "invalid_request"),
        ({"extra_body": {"steps": 3}}, "steps", "invalid_request"),
        ({"extra_body": {"guidance_scale": "4"}}, "guidance_scale", "invalid_request"),
        ({"extra_body": {"init_image": "http://a/b.png"}}, "init_image", "invalid_request"),
        ({"extra_body": {"lora": "nobody"}}, "loras", "invalid_request"),
    ],
)
def test_bad_input_has_the_clients_shape_and_kelvins_field_value_and_remedy(
    client: openai.OpenAI, http: httpx.Client, wrong: dict[str, Any], param: str, code: str
):
    before = http.get("/v1/jobs").json()["jobs"][:1]
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a", **wrong})
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert isinstance(error.body, dict)
    assert error.body["field"] == param
    assert error.body["allowed"]
    assert error.body["value"] is not None
    assert str(error.body["allowed"]) in error.body["message"]
    after = http.get("/v1/jobs").json()["jobs"][:1]
    assert [job["id"] for job in after] == [job["id"] for job in before]


def test_an_edit_takes_one_image_and_no_mask(client: openai.OpenAI, http: httpx.Client):
    with pytest.raises(openai.BadRequestError) as masked:
        client.images.edit(image=png(), mask=png(), prompt="a")
    assert (masked.value.param, masked.value.code) == ("mask", "not_supported_yet")
    with pytest.raises(openai.BadRequestError) as several:
        client.images.edit(image=[png(), png()], prompt="a")
    assert (several.value.param, several.value.code) == ("image", "not_supported_yet")
    with pytest.raises(openai.BadRequestError) as broken:
        client.images.edit(image=png()[:60], prompt="a")
    assert broken.value.param == "image"
    json_body = http.post("/v1/images/edits", json={"prompt": "a"})
    assert (json_body.status_code, json_body.json()["error"]["param"]) == (415, "content-type")
    no_form = http.post(
        "/v1/images/edits", content=b"x", headers={"content-type": "multipart/form-data"}
    )
    assert (no_form.status_code, no_form.json()["error"]["param"]) == (400, "body")


@pytest.mark.parametrize("charset", ["punycode", "idna", "zlib", "utf-16"])
def test_a_form_is_in_utf_8_whatever_else_python_could_read(http: httpx.Client, charset: str):
    # Punycode, to take the worst, is read in the square of its length: hours for a few MiB, during
    # which the Pipeline would answer nobody.
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    field = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    answer = http.post("/v1/images/edits", content=field, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "content-type")


def test_models_are_listed_for_this_client_and_for_kelvins_own(
    client: openai.OpenAI, http: httpx.Client
):
    assert [model.id for model in client.models.list()] == ["pico"]
    assert client.models.retrieve("pico").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dall-e-2")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a", model="dall-e-3")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert http.get("/v1/models").json()["models"][0]["name"] == "pico"


def test_a_wrong_key_and_a_wrong_route_have_the_clients_shape(client: openai.OpenAI):
    wrong, _ = new_key("acme", ("generate",))
    with pytest.raises(openai.AuthenticationError) as caught:
        client.images.generate(prompt="a", extra_headers={"Authorization": f"Bearer {wrong}"})
    assert (caught.value.code, caught.value.type) == ("unauthenticated", "authentication_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.create_variation(image=png())
    assert missing.value.code == "route_not_found"


def test_a_full_service_is_tried_again_when_it_says_so(
    door: Served, stages: StandIn, pipeline: Pipeline
):
    # One place is held for as long as the client has not been refused once.
    stages.gate.clear()
    submitted = [
        asyncio.run_coroutine_threadsafe(pipeline.submit(REQUEST), door.loop) for _ in range(3)
    ]
    for future in submitted:
        future.result(WAIT_S)
    waits: list[str] = []

    def refused(response: Any) -> None:
        if response.status_code == 429:
            waits.append(response.headers["retry-after"])
            door.call(stages.gate.set)

    http = openai.DefaultHttpxClient(event_hooks={"response": [refused]})
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", http_client=http) as client:
        assert client.images.generate(prompt="a").data
    assert len(waits) >= 1
    assert all(int(each) > 0 for each in waits)


def test_what_would_fail_again_is_not_tried_again(door: Served, stages: StandIn):
    stages.error = StageFailed("It cannot be done.", field="latents", allowed="another picture")
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="none") as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="a")
        assert (caught.value.code, caught.value.type) == ("stage_failed", "server_error")
        assert caught.value.response.headers["x-kelvin-job-id"]
        assert len(stages.denoised) == 1
        with (
            client.images.generate(prompt="a", stream=True) as stream,
            pytest.raises(openai.APIError, match="It cannot be done") as streamed,
        ):
            list(stream)
    assert streamed.value.code == "stage_failed"
