"""The Pipeline on a real store with stand-ins for the stages: who decides how a job ends."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any
from unittest.mock import AsyncMock

import pytest

from serve import endings as endings_module
from serve import telemetry
from serve.config import StorageSettings
from serve.errors import (
    InvalidRequest,
    JobCancelled,
    JobConflict,
    JobNotFound,
    Overloaded,
    StageFailed,
    StorageUnavailable,
)
from serve.jobs import JobJournal
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline


async def test_a_job_from_queued_to_stored(pipeline: Pipeline, stages: StandIn):
    result = await pipeline.generate(REQUEST)
    assert [job.prompt for job in stages.encoded] == ["a", ""]
    assert result.warnings == ("a", "")
    names = [event.event for event in await follow(pipeline, result.id)]
    assert names == ["queued", "text", "step", "step", "decode", "stored"]
    record = await pipeline.job(result.id)
    assert record.status == "succeeded"
    assert record.result is not None
    assert record.result.images[0].sha256 == result.images[0].sha256


async def test_without_guidance_no_negative_prompt_is_encoded(pipeline: Pipeline, stages: StandIn):
    await pipeline.generate(REQUEST.model_copy(update={"guidance_scale": 1.0}))
    assert [job.prompt for job in stages.encoded] == ["a"]
    assert stages.denoised[0].negative is None


async def test_another_process_reads_and_follows_the_job(
    pipeline: Pipeline,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    other = new_pipeline(StandIn(), storage, monkeypatch)
    stages.gate.clear()
    job_id = (await pipeline.submit(REQUEST)).id
    assert (await pipeline.job(job_id)).status == "running"
    assert (await other.job(job_id)).status == "pending"
    following = asyncio.create_task(follow(other, job_id))
    await stages.at_gate.wait()
    stages.gate.set()
    events = await following
    assert [event.event for event in events] == ["queued", "stored"]
    assert events[-1].result is not None
    assert events[-1].result.images[0].url


async def test_another_process_cancels_the_job(
    pipeline: Pipeline,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    other = new_pipeline(StandIn(), storage, monkeypatch)
    stages.gate.clear()
    waiting = asyncio.create_task(pipeline.generate(REQUEST))
    await stages.at_gate.wait()
    (job_id,) = await JobJournal(ObjectStore(storage)).pending()
    assert (await other.cancel(job_id)).status == "cancelled"
    # The gate stays shut: only the cancellation ends this.
    with pytest.raises(JobCancelled):
        await waiting
    assert (await follow(pipeline, job_id))[-1].event == "cancelled"


async def test_a_cancellation_wins_over_a_picture_that_comes_too_late(
    pipeline: Pipeline,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    other = new_pipeline(StandIn(), storage, monkeypatch)
    monkeypatch.setattr(endings_module, "_CANCEL_POLL_S", 3600)
    stages.gate.clear()
    waiting = asyncio.create_task(pipeline.generate(REQUEST))
    await stages.at_gate.wait()
    (job_id,) = await JobJournal(ObjectStore(storage)).pending()
    await other.cancel(job_id)
    stages.gate.set()
    with pytest.raises(JobCancelled):
        await waiting
    for reader in (pipeline, other):
        assert (await reader.job(job_id)).status == "cancelled"


async def test_a_failure_is_recorded_as_it_was_raised(pipeline: Pipeline, stages: StandIn):
    stages.error = ValueError("out of memory")
    with pytest.raises(StageFailed, match="out of memory") as caught:
        await pipeline.generate(REQUEST)
    job_id = next(iter(pipeline._jobs.ended))
    record = await pipeline.job(job_id)
    assert record.status == "failed"
    assert record.error == caught.value.body()
    assert (await follow(pipeline, job_id))[-1].error == caught.value.body()
    with pytest.raises(JobConflict):
        await pipeline.cancel(job_id)


async def test_the_trace_of_a_failed_job_says_so(
    pipeline: Pipeline, stages: StandIn, monkeypatch: pytest.MonkeyPatch
):
    marked: list[BaseException] = []
    monkeypatch.setattr(telemetry, "mark_failed", lambda _, error: marked.append(error))
    await pipeline.generate(REQUEST)
    assert marked == []
    # Raised where it is given to the job, so beneath no span of ours.
    monkeypatch.setattr(
        pipeline._models.own.production, "make", AsyncMock(side_effect=StageFailed("boom"))
    )
    with pytest.raises(StageFailed) as caught:
        await pipeline.generate(REQUEST)
    assert marked == [caught.value]


async def test_an_end_that_cannot_be_written_down_is_not_told_until_it_can(
    pipeline: Pipeline, stages: StandIn, monkeypatch: pytest.MonkeyPatch
):
    publish, refused = JobJournal.publish, asyncio.Event()

    async def gone_at_first(self: JobJournal, *ended: Any) -> bool:
        if not refused.is_set():
            refused.set()
            raise StorageUnavailable("gone")
        return await publish(self, *ended)

    stages.gate.clear()
    stages.error = ValueError("out of memory")
    job_id = (await pipeline.submit(REQUEST)).id
    following = asyncio.create_task(follow(pipeline, job_id))
    await stages.at_gate.wait()
    monkeypatch.setattr(JobJournal, "publish", gone_at_first)
    stages.gate.set()
    await refused.wait()
    assert (await pipeline.job(job_id)).status == "running"
    told = (await following)[-1]
    assert told.event == "failed"
    assert told.error == (await pipeline.job(job_id)).error
    assert (await follow(pipeline, job_id))[-1] == told


async def test_a_request_that_was_changed_unchecked_is_checked(pipeline: Pipeline):
    for wrong in ({"num_inference_steps": 10**9}, {"guidance_scale": float("nan")}, {"seed": -1}):
        with pytest.raises(InvalidRequest) as caught:
            await pipeline.submit(REQUEST.model_copy(update=wrong))
        assert caught.value.field in wrong


async def test_events_are_kept_of_the_newest_jobs_only(pipeline: Pipeline):
    ids = [(await pipeline.generate(REQUEST)).id for _ in range(3)]
    pipeline._jobs.ended.forget(ids[0])
    names = [[event.event for event in await follow(pipeline, job_id)] for job_id in ids]
    assert names[0] == ["queued", "stored"]
    assert [len(own) for own in names[1:]] == [6, 6]


async def test_no_password_of_an_endpoint_is_shown(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    secret = storage.model_copy(update={"endpoint_url": "http://me:secret@127.0.0.1:9/"})
    pipeline = new_pipeline(stages, secret, monkeypatch)
    monkeypatch.setattr(pipeline._models.own.readiness, "replicas", AsyncMock(return_value={}))
    assert (await pipeline.status())["storage"]["endpoint_url"] == "http://127.0.0.1:9"


async def test_more_than_the_denoisers_take_is_refused_before_it_is_accepted(
    pipeline: Pipeline, stages: StandIn, storage: StorageSettings
):
    stages.gate.clear()
    two = REQUEST.model_copy(update={"num_images": 2})
    first = await pipeline.submit(two)
    with pytest.raises(Overloaded) as caught:
        await pipeline.submit(two)
    assert caught.value.field == "num_images"
    second = await pipeline.submit(REQUEST)
    assert await JobJournal(ObjectStore(storage)).pending() == sorted([first.id, second.id])
    stages.gate.set()
    for job in (first, second):
        assert (await follow(pipeline, job.id))[-1].event == "stored"
    await pipeline.generate(two)


@pytest.mark.parametrize("stage", ["text_encoder", "denoiser", "vae_decoder"])
async def test_the_narrowest_stage_decides_how_much_is_taken(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch, stage: str
):
    pipeline = new_pipeline(stages, storage, monkeypatch, narrowest=stage)
    stages.gate.clear()
    first = await pipeline.submit(REQUEST.model_copy(update={"num_images": 2}))
    with pytest.raises(Overloaded):
        await pipeline.submit(REQUEST.model_copy(update={"num_images": 2}))
    stages.gate.set()
    assert (await follow(pipeline, first.id))[-1].event == "stored"


async def test_a_schedule_the_denoiser_would_refuse_is_not_accepted(
    pipeline: Pipeline, storage: StorageSettings
):
    with pytest.raises(InvalidRequest) as caught:
        await pipeline.submit(REQUEST.model_copy(update={"shift": 1e-30}))
    assert caught.value.field == "shift"
    assert await JobJournal(ObjectStore(storage)).pending() == []


async def test_a_single_large_job_is_taken_when_nothing_else_runs(pipeline: Pipeline):
    result = await pipeline.generate(REQUEST.model_copy(update={"num_images": 8}))
    assert [image.seed for image in result.images] == list(range(5, 13))


async def test_closing_a_stream_cancels_its_job(pipeline: Pipeline, stages: StandIn):
    stages.gate.clear()
    stream: Any = pipeline.stream(REQUEST)
    job_id = (await anext(stream)).id
    await stages.at_gate.wait()
    await stream.aclose()
    assert (await follow(pipeline, job_id))[-1].event == "cancelled"
    assert (await pipeline.job(job_id)).status == "cancelled"


async def test_unknown_jobs_are_not_found(pipeline: Pipeline):
    for job_id in ("0" * 32, "../../secret", ""):
        for call in (pipeline.job, pipeline.cancel):
            with pytest.raises(JobNotFound):
                await call(job_id)
        with pytest.raises(JobNotFound):
            await follow(pipeline, job_id)


async def test_a_stored_picture_is_read_until_it_is_deleted(pipeline: Pipeline):
    result = await pipeline.generate(REQUEST)
    image = result.images[0]
    assert hashlib.sha256(await pipeline.picture(image)).hexdigest() == image.sha256
    elsewhere = image.model_copy(update={"s3_uri": "s3://elsewhere/images/a.png"})
    await pipeline.delete(result.id)
    for gone in (image, elsewhere):
        with pytest.raises(JobNotFound):
            await pipeline.picture(gone)
