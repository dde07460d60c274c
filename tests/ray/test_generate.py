"""From a prompt to a picture in S3, over HTTP and by handle."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from serve.pictures import read_request
from serve.requests import GenerateRequest, GenerateResult
from serve.storage import ObjectStore
from tests.ray.events import following
from tests.ray.world import FAST, World, decoded, wait_until


def test_a_prompt_becomes_a_stored_picture(world: World):
    result = world.generate(width=96, height=64)
    (image,) = result["images"]
    data = world.fetch(image)
    assert hashlib.sha256(data).hexdigest() == image["sha256"]
    assert len(data) == image["size_bytes"]
    assert decoded(data).shape == (64, 96, 3)
    assert image["s3_uri"].startswith("s3://pictures/images/")
    assert image["sha256"] in image["s3_uri"]
    assert [report["stage"] for report in result["stages"]] == [
        "text",
        "denoise",
        "decode",
        "store",
    ]
    assert all(report["precision"] for report in result["stages"])


def test_openais_client_edits_a_picture(world: World):
    """Over the proxy, with a multipart body, through the encoder in another process."""
    picture = world.fetch(world.generate(width=96, height=64)["images"][0])
    key: dict[str, Any] = {"api_key": "none", "max_retries": 0}
    with openai.OpenAI(base_url=str(world.http.base_url.join("/v1")), **key) as client:
        told = client.images.edit(
            image=picture, prompt="b", stream=True, partial_images=1, extra_body={"strength": 1}
        )
        *partial, last = list(told)
        assert [event.type for event in partial] <= ["image_edit.partial_image"]
        assert decoded(base64.b64decode(last.b64_json)).shape == (64, 96, 3)
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a", size="9x9")
    assert caught.value.param == "size"
    assert caught.value.request_id


def test_an_expired_url_is_refused(world: World):
    result = world.generate()
    store = ObjectStore(world.storage)
    key = store.key_of(result["images"][0]["s3_uri"])
    assert key is not None
    lasting, brief = store.presign(key, expiry_s=600), store.presign(key, expiry_s=1)
    wait_until(lambda: httpx.get(brief, trust_env=False).status_code == 403)
    assert httpx.get(lasting, trust_env=False).status_code == 200
    store.close()


def test_three_stages_run_in_three_processes(world: World):
    stages = {report["stage"]: report["pid"] for report in world.generate()["stages"]}
    assert len({stages["text"], stages["denoise"], stages["decode"]}) == 3
    # The Pipeline stores, and is none of the three.
    assert len(set(stages.values())) == 4


def test_work_is_spread_over_the_replicas_of_each_stage(world: World):
    ids = [
        world.submit(prompt=f"picture {number}", num_images=4, num_inference_steps=10)
        for number in range(8)
    ]
    seen: dict[str, set[str]] = {}
    for job_id in ids:
        with following(world.http, job_id) as events:
            *_, last = events
        assert last["event"] == "stored"
        for report in last["result"]["stages"]:
            seen.setdefault(report["stage"], set()).add(report["replica"])
    for stage in ("text", "denoise", "decode"):
        known = {replica["replica"] for replica in world.replicas(stage)}
        assert len(known) == 2
        assert seen[stage] == known


def test_the_same_request_gives_the_same_pixels(world: World):
    pictures: dict[str, list[bytes]] = {}

    def both_took_part() -> bool:
        # One by one, for bytes are the same alone only. A denoiser that was measured slower while
        # the other is free gets its next chance when that measurement is old.
        result = world.generate(num_inference_steps=4)
        replica = next(r["replica"] for r in result["stages"] if r["stage"] == "denoise")
        pictures.setdefault(replica, []).append(world.pixels(result).tobytes())
        return len(pictures) == 2

    wait_until(both_took_part, within_s=120)
    assert len({data for made in pictures.values() for data in made}) == 1
    other = world.pixels(world.generate(num_inference_steps=4, seed=8)).tobytes()
    assert other not in pictures[next(iter(pictures))]


def test_picture_i_is_the_picture_of_its_own_seed(world: World):
    together = world.generate(num_images=3, seed=2**64 - 2)
    assert [image["seed"] for image in together["images"]] == [2**64 - 2, 2**64 - 1, 0]
    for index, image in enumerate(together["images"]):
        alone = world.generate(seed=image["seed"])
        np.testing.assert_array_equal(world.pixels(together, index), world.pixels(alone))


def test_a_drawn_seed_is_recorded_and_reproduces_the_picture(world: World):
    drawn = world.generate(seed=None)
    again = world.http.post("/v1/generate", json=drawn["request"]).json()
    assert again["request"] == drawn["request"]
    np.testing.assert_array_equal(world.pixels(drawn), world.pixels(again))


@pytest.mark.parametrize(
    ("output_format", "content_type"),
    [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")],
)
def test_a_picture_can_be_made_again_from_itself(
    world: World, output_format: str, content_type: str
):
    first = world.generate(
        output_format=output_format,
        quality=80,
        prompt="zwölf grüne ▲",
        negative_prompt="blurry",
        num_images=2,
    )
    for image in first["images"]:
        answer = httpx.get(image["url"], trust_env=False)
        assert answer.headers["content-type"] == content_type
        embedded = read_request(answer.content)
        assert embedded.prompt == "zwölf grüne ▲"
        assert embedded.seed == image["seed"]
        again = world.http.post("/v1/generate", json=embedded.model_dump()).json()
        np.testing.assert_array_equal(decoded(answer.content), world.pixels(again))


def test_prompts_stay_out_of_the_file_on_request(world: World):
    result = world.generate(embed_prompt=False, prompt="a secret", negative_prompt="hidden")
    data = world.fetch(result["images"][0])
    assert b"secret" not in data
    assert b"hidden" not in data
    assert read_request(data, prompt="a secret").seed == FAST["seed"]


def test_guidance_decides_whether_the_negative_prompt_counts(world: World):
    def pixels(**fields: object) -> bytes:
        return world.pixels(world.generate(**fields)).tobytes()

    assert pixels(guidance_scale=5.0) != pixels(guidance_scale=5.0, negative_prompt="red")
    assert pixels(guidance_scale=1.0) == pixels(guidance_scale=1.0, negative_prompt="red")


def test_a_long_prompt_is_truncated_with_a_warning(world: World):
    assert world.generate()["warnings"] == []
    long = {"prompt": "red circle " * 300}
    result = world.generate(**long)
    assert result["warnings"]
    by_handle = world.handle.generate.remote(GenerateRequest(**FAST | long)).result()
    assert list(by_handle.warnings) == result["warnings"]


def test_the_handle_makes_the_same_picture(world: World):
    result = world.handle.generate.remote(GenerateRequest(**FAST)).result()
    assert isinstance(result, GenerateResult)
    over_http = world.generate()
    np.testing.assert_array_equal(
        world.pixels(result.model_dump(mode="json")), world.pixels(over_http)
    )


def test_the_handle_streams_the_events(world: World):
    request = GenerateRequest(**(FAST | {"num_inference_steps": 5}))
    events = list(world.handle.options(stream=True).stream.remote(request))
    assert [event.event for event in events] == [
        "queued",
        "text",
        *["step"] * 5,
        "decode",
        "stored",
    ]
    assert [event.step for event in events if event.event == "step"] == [1, 2, 3, 4, 5]
    assert {event.steps for event in events if event.event == "step"} == {5}
    assert events[-1].result.images[0].sha256
