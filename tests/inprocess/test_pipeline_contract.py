"""What a request asks of the denoiser and what comes back of it: deadlines, previews, joules."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.payloads import StepProgress
from serve.config import StorageSettings
from serve.errors import DeadlineExceeded, StageFailed
from serve.pictures import read_request
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from tests.inprocess.stand_in_stages import LATENTS, REQUEST, StandIn, follow

SOON_S = 0.05


def asking(**fields: Any) -> Any:
    return REQUEST.model_copy(update=fields)


async def test_what_is_asked_reaches_the_denoiser(pipeline: Pipeline, stages: StandIn):
    await pipeline.generate(REQUEST)
    await pipeline.generate(
        asking(
            priority=7,
            deadline_s=3600.0,
            guidance_interval=(0.2, 0.9),
            negative_prompt_range=(0.0, 0.1),
            preview_every=3,
        )
    )
    plain, asked = stages.denoised
    assert (plain.priority, plain.deadline_s, plain.guidance_interval) == (0, None, None)
    assert (plain.negative_prompt_range, plain.preview_every) == ((0.0, 1.0), 0)
    assert (asked.priority, asked.guidance_interval) == (7, (0.2, 0.9))
    assert (asked.negative_prompt_range, asked.preview_every) == ((0.0, 0.1), 3)
    # What is left of it: encoding came first.
    assert 0 < asked.deadline_s < 3600


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode", "store"])
async def test_a_deadline_ends_a_job_wherever_it_is(
    pipeline: Pipeline, stages: StandIn, monkeypatch: pytest.MonkeyPatch, stage: str
):
    stages.hung = stage
    if stage == "store":
        put = ObjectStore.put

        async def hangs(self: ObjectStore, key: str, *args: Any, **options: Any) -> Any:
            if key.startswith("images/"):
                await asyncio.Event().wait()
            return await put(self, key, *args, **options)

        monkeypatch.setattr(ObjectStore, "put", hangs)
    with pytest.raises(DeadlineExceeded) as caught:
        await pipeline.generate(asking(deadline_s=SOON_S, num_images=2))
    error = caught.value
    assert (error.status, error.field, error.value) == (504, "deadline_s", SOON_S)
    assert error.allowed
    job_id = next(iter(pipeline._jobs.ended))
    record = await pipeline.job(job_id)
    assert (record.status, record.error) == ("failed", error.body())
    assert (await follow(pipeline, job_id))[-1].error == error.body()
    assert (await pipeline.status())["pipeline"]["running_jobs"] == 0


async def test_a_deadline_that_the_denoiser_cannot_keep_is_told_in_the_callers_terms(
    pipeline: Pipeline, stages: StandIn
):
    stages.error = DeadlineExceeded("Twelve steps are missing.", field="deadline_s", value=3.2)
    with pytest.raises(DeadlineExceeded, match="Twelve steps") as caught:
        await pipeline.generate(asking(deadline_s=3600.0))
    assert caught.value.value == 3600.0


async def test_a_deadline_kept_changes_nothing_and_another_failure_stays_itself(
    pipeline: Pipeline, stages: StandIn
):
    result = await pipeline.generate(asking(deadline_s=3600.0))
    assert result.request.deadline_s == 3600.0
    stages.error = TimeoutError("of something else")
    with pytest.raises(StageFailed, match="something else"):
        await pipeline.generate(asking(deadline_s=3600.0))


async def test_previews_and_paths_reach_followers(pipeline: Pipeline, stages: StandIn):
    preview = np.zeros((2, 3, 3), np.uint8)
    preview[..., 0] = 255
    stages.steps = [
        StepProgress(1, 3, 0.1),
        StepProgress(2, 3, 0.1, preview, "graph"),
        StepProgress(3, 3, 0.1),
    ]
    stages.gate.clear()
    events = []
    async for event in pipeline.stream(asking(preview_every=2)):
        events.append(event)
        if event.event == "step":
            stages.gate.set()
    steps = [event for event in events if event.event == "step"]
    assert [event.path for event in steps] == ["eager", "graph", "eager"]
    assert [event.preview is not None for event in steps] == [False, True, False]
    with Image.open(io.BytesIO(base64.b64decode(steps[1].preview or ""))) as shown:
        assert shown.size == (3, 2)
        red, green, blue = np.asarray(shown.convert("RGB")).reshape(-1, 3).mean(axis=0)
    assert red > 240 > 20 > max(green, blue)
    result = events[-1].result
    assert result is not None
    (denoised,) = [stage for stage in result.stages if stage.stage == "denoise"]
    assert denoised.path == "mixed"
    # Who comes after the end gets the pictures themselves.
    assert all(event.preview is None for event in await follow(pipeline, result.id))


async def test_joules_are_summed_and_unknown_as_soon_as_one_is(pipeline: Pipeline, stages: StandIn):
    assert (await pipeline.status())["pipeline"]["joules"] is None
    stages.latents = [replace(LATENTS, joules=20.5), replace(LATENTS, joules=10.0)]
    result = await pipeline.generate(asking(num_images=2))
    assert result.joules == 30.5
    reports = [report for report in result.stages if report.stage == "denoise"]
    assert sorted(report.joules or 0.0 for report in reports) == [10.0, 20.5]
    assert {report.path for report in reports} == {"eager"}
    record = await pipeline.job(result.id)
    assert record.result is not None
    assert record.result.joules == 30.5
    stages.latents = [replace(LATENTS, joules=1.0), LATENTS]
    assert (await pipeline.generate(asking(num_images=2))).joules is None
    assert (await pipeline.status())["pipeline"]["joules"] == 31.5


async def test_a_picture_carries_what_makes_it_and_not_what_hurried_it(
    pipeline: Pipeline, storage: StorageSettings
):
    asked = asking(
        priority=3,
        deadline_s=3600.0,
        preview_every=1,
        guidance_interval=(0.25, 1.0),
        negative_prompt_range=(0.0, 0.1),
    )
    result = await pipeline.generate(asked)
    assert result.request.priority == 3
    store = ObjectStore(storage)
    data = await store.get(store.key_of(result.images[0].s3_uri) or "")
    made = read_request(data or b"")
    assert (made.priority, made.deadline_s, made.preview_every) == (0, None, 0)
    assert made.guidance_interval == (0.25, 1.0)
    assert made.negative_prompt_range == (0.0, 0.1)
