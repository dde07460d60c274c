"""Deadlines and previews through every process: asked over HTTP and by handle."""

from __future__ import annotations

import base64
import os
import signal

import pytest

from serve.client import Kelvin
from serve.errors import DeadlineExceeded
from serve.requests import GenerateRequest, JobEvent
from tests.ray.events import following
from tests.ray.world import ENDLESS, FAST, World, decoded, wait_until

BRIEF = {**ENDLESS, "deadline_s": 0.5}


def test_a_job_past_its_deadline_fails_and_leaves_nothing_running(world: World):
    answer = world.http.post("/v1/generate", json=BRIEF)
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["type"], error["field"], error["value"]) == (
        "DeadlineExceeded",
        "deadline_s",
        0.5,
    )
    with pytest.raises(DeadlineExceeded) as caught:
        world.handle.generate.remote(GenerateRequest(**BRIEF)).result()
    assert (caught.value.field, caught.value.value) == ("deadline_s", 0.5)
    wait_until(lambda: all(replica["queue_length"] == 0 for replica in world.replicas("denoise")))
    assert world.generate(deadline_s=600, priority=10)["request"]["deadline_s"] == 600


def test_the_end_of_a_late_job_is_told_to_followers_and_kept(world: World):
    world.generate(num_inference_steps=8)  # so that it is known what a step takes
    # What cannot be done in time is not accepted: only what nobody foresees makes a job late.
    denoisers = [replica["pid"] for replica in world.replicas("denoise")]
    try:
        for pid in denoisers:
            os.kill(pid, signal.SIGSTOP)
        with following(world.http, world.submit(num_inference_steps=8, deadline_s=2.0)) as events:
            *_, last = events
    finally:
        for pid in denoisers:
            os.kill(pid, signal.SIGCONT)
    assert last["event"] == "failed"
    assert last["error"]["error"]["code"] == "deadline_exceeded"
    record = world.http.get(f"/v1/jobs/{last['id']}").json()
    assert (record["status"], record["error"]) == ("failed", last["error"])


def test_previews_come_with_the_steps_that_were_asked_for(world: World):
    fields = FAST | {"num_inference_steps": 7, "preview_every": 3, "width": 96, "height": 64}
    events: list[JobEvent] = []
    with Kelvin(world.kelvin.url if world.kelvin else "") as client:
        client.generate(GenerateRequest(**fields), events.append)
    by_handle = list(world.handle.options(stream=True).stream.remote(GenerateRequest(**fields)))
    for told in (events, by_handle):
        previews = {event.step: event.preview for event in told if event.preview}
        assert list(previews) == [3, 6]
        for preview in previews.values():
            assert decoded(base64.b64decode(preview)).shape == (8, 12, 3)
    plain = list(world.handle.options(stream=True).stream.remote(GenerateRequest(**FAST)))
    assert not any(event.preview for event in plain)


def test_a_result_says_how_it_was_made(world: World):
    result = world.generate()
    (denoised,) = [report for report in result["stages"] if report["stage"] == "denoise"]
    assert denoised["path"] == "eager"  # the CPU has no graphs
    assert result["joules"] is denoised["joules"] is None  # nor a counter
    assert world.http.get("/v1/status").json()["pipeline"]["joules"] is None


def test_a_guidance_interval_and_a_negative_range_change_the_picture(world: World):
    def pixels(**fields: object) -> bytes:
        given = {"num_inference_steps": 8, "guidance_scale": 5.0, "negative_prompt": "red"}
        return world.pixels(world.generate(**(given | fields))).tobytes()

    everywhere = pixels()
    assert pixels(guidance_interval=[0.0, 1.0]) == everywhere
    assert pixels(negative_prompt_range=[0.0, 1.0]) == everywhere
    assert pixels(guidance_interval=[0.2, 0.9]) != everywhere
    assert pixels(negative_prompt_range=[0.0, 0.1]) != everywhere
