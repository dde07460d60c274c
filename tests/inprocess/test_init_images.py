"""Image-to-image through the Pipeline: a start image is durable, private, and goes with its job."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve import inputs as inputs_module
from serve.client import Kelvin
from serve.commands.generate import request_from
from serve.config import StorageSettings
from serve.errors import InvalidRequest, StorageUnavailable
from serve.init_image import sent_bytes
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.pipeline import Pipeline
from serve.requests import GenerateRequest
from serve.storage import ObjectStore
from serve.sweep import Sweep
from tests.inprocess.ended_pipelines import ended, stop
from tests.inprocess.polling import until
from tests.inprocess.served import served
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline

DAY_S = 86_400.0


def picture(width: int = 32, height: int = 48) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def asked(data: bytes, **fields: Any) -> GenerateRequest:
    init_image = base64.b64encode(data).decode()
    return REQUEST.model_copy(update={"init_image": init_image, **fields})


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


async def test_the_stages_get_the_picture_and_the_result_names_a_copy_of_it(
    pipeline: Pipeline, stages: StandIn, store: ObjectStore
):
    result = await pipeline.generate(asked(picture(), strength=0.3, num_images=2))
    (encoded,) = stages.started
    assert np.array_equal(encoded, pixels(picture()))
    assert [(job.strength, job.init is not None) for job in stages.denoised] == [(0.3, True)] * 2
    assert (result.request.width, result.request.height) == (32, 48)
    assert [report.stage for report in result.stages[:2]] == ["text", "encode"]
    key = store.key_of(str(result.request.init_image))
    assert key == f"images/{result.id}/input.png"
    assert np.array_equal(pixels(await store.get(key) or b""), encoded)
    # Sending the resolved request again asks for the same.
    again = await pipeline.generate(result.request)
    assert np.array_equal(stages.started[1], encoded)
    assert again.request.init_image != result.request.init_image
    assert again.request.strength == 0.3


async def test_it_is_in_the_store_before_the_job_is_accepted_and_found_by_who_takes_over(
    storage: StorageSettings, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    hung, other = StandIn(), StandIn()
    hung.hung = "encode"
    settings = JournalSettings(lease_s=3.0)
    first = new_pipeline(hung, storage, monkeypatch, journal=settings)
    second = new_pipeline(other, storage, monkeypatch, journal=settings)
    await first.check_health()
    record = await first.submit(asked(picture()))
    assert record.request is not None
    assert await store.exists(f"images/{record.id}/input.png")
    stop(first)
    await second.check_health()
    try:
        over = await ended(JobJournal(store), record.id)
    finally:
        stop(second)
    assert over.status == "succeeded"
    assert np.array_equal(other.started[0], pixels(picture()))


async def test_a_store_that_refuses_it_accepts_no_job(
    pipeline: Pipeline, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    put = ObjectStore.put

    async def failing(self: ObjectStore, key: str, *given: Any, **options: Any) -> bool:
        if key.startswith("images/"):
            raise StorageUnavailable("gone")
        return await put(self, key, *given, **options)

    monkeypatch.setattr(ObjectStore, "put", failing)
    with pytest.raises(StorageUnavailable):
        await pipeline.submit(asked(picture()))
    assert await store.list_keys("jobs/") == []
    assert pipeline._live == {}


@pytest.mark.parametrize("data", [b"no picture", picture()[:-40]], ids=["text", "cut short"])
async def test_what_is_no_picture_is_refused_and_leaves_nothing(
    pipeline: Pipeline, store: ObjectStore, data: bytes
):
    with pytest.raises(InvalidRequest) as caught:
        await pipeline.submit(asked(data))
    assert caught.value.field == "init_image"
    assert await store.list_keys("") == []


async def test_only_ones_own_pictures_and_uploads_are_read(pipeline: Pipeline, store: ObjectStore):
    made = await pipeline.generate(REQUEST, "tenant-a")
    upload = await pipeline.upload(picture(), "tenant-a")
    default = await pipeline.generate(REQUEST)
    own = (made.images[0].s3_uri, upload.init_image)
    for uri in own:
        again = await pipeline.generate(REQUEST.model_copy(update={"init_image": uri}), "tenant-a")
        assert again.request.init_image != uri
    here = store.s3_uri("x").removesuffix("x")
    others = (
        *own,
        f"s3://{store.settings.bucket}/other/images/a.png",
        "s3://another-bucket/images/a.png",
        f"{here}images/{default.id}/../../jobs/{default.id}/request.json",
        f"{here}jobs/{default.id}/request.json",
        f"{here}uploads/default/../tenant-a/x",
    )
    for uri in others:
        with pytest.raises(InvalidRequest) as caught:
            await pipeline.submit(REQUEST.model_copy(update={"init_image": uri}))
        assert "your own" in caught.value.message
        assert "uploads/default/" in str(caught.value.allowed)
    gone = store.s3_uri(f"images/{new_job_id()}/input.png")
    with pytest.raises(InvalidRequest, match="any more"):
        await pipeline.submit(REQUEST.model_copy(update={"init_image": gone}))


async def test_one_idempotency_key_is_one_job(pipeline: Pipeline, stages: StandIn):
    stages.gate.clear()
    request = asked(picture(), idempotency_key="k")
    first, second = await pipeline.submit(request), await pipeline.submit(request)
    assert first.id == second.id
    stages.gate.set()
    assert (await follow(pipeline, first.id))[-1].event == "stored"
    assert (await pipeline.generate(request)).id == first.id
    assert len(stages.started) == 1


async def test_it_goes_with_its_job_and_not_before(pipeline: Pipeline, store: ObjectStore):
    kept = await pipeline.generate(asked(picture()))
    deleted = await pipeline.generate(asked(picture()))
    upload = await pipeline.upload(picture())
    await pipeline.delete(deleted.id)
    assert await store.list_keys(f"images/{deleted.id}/") == []

    def sweep(days_on: float) -> Sweep:
        return Sweep(store, store, 30 * DAY_S, time.time() + days_on * DAY_S)

    early = await sweep(29).run()
    assert (early.unreferenced_pictures, early.uploads) == (0, 0)
    assert await store.exists(f"images/{kept.id}/input.png")
    swept = await sweep(31).run()
    # The picture counts, what it was made from does not.
    assert (swept.pictures_of_jobs, swept.uploads) == (1, 1)
    assert await store.list_keys("images/") == []
    assert not await store.exists(store.key_of(upload.init_image) or "")


async def test_what_a_job_that_was_never_accepted_left_goes_after_an_hour(
    pipeline: Pipeline, store: ObjectStore
):
    await store.put(key := f"images/{new_job_id()}/input.png", picture(), "image/png")
    soon, later = (Sweep(store, store, 30 * DAY_S, time.time() + s) for s in (3000.0, 4000.0))
    assert (await soon.run()).unreferenced_pictures == 0
    assert (await later.run()).unreferenced_pictures == 1
    assert not await store.exists(key)


def test_a_picture_is_uploaded_once_and_started_from_by_its_uri(
    pipeline: Pipeline, stages: StandIn
):
    with served(pipeline) as server, Kelvin(server.url) as kelvin:
        upload = kelvin.upload(picture())
        assert (upload.width, upload.height) == (32, 48)
        asked = GenerateRequest(prompt="a", init_image=upload.init_image, strength=1)
        assert kelvin.generate(asked).images
        with pytest.raises(InvalidRequest) as caught:
            kelvin.upload(b"text")
    assert caught.value.field == "init_image"
    assert np.array_equal(stages.started[0], pixels(picture()))


async def test_a_store_that_is_away_for_a_while_is_waited_for(
    pipeline: Pipeline, stages: StandIn, monkeypatch: pytest.MonkeyPatch
):
    get = ObjectStore.get
    refusals: list[str] = []

    async def failing(self: ObjectStore, key: str) -> bytes | None:
        if key.endswith("/input.png") and len(refusals) < 2:
            refusals.append(key)
            raise StorageUnavailable("gone")
        return await get(self, key)

    monkeypatch.setattr(ObjectStore, "get", failing)
    monkeypatch.setattr(inputs_module, "_FIRST_PAUSE_S", 0.01)
    await pipeline.generate(asked(picture()))
    assert len(refusals) == 2
    assert len(stages.started) == 1


def test_the_command_sends_a_file_or_a_uri(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture())
    given = {"prompt": "a", "strength": 0.5}
    sent = request_from({**given, "init_image": str(tmp_path / "a.png")}).init_image
    assert sent_bytes(str(sent)) == picture()
    assert (
        request_from({**given, "init_image": "s3://b/uploads/x"}).init_image == "s3://b/uploads/x"
    )
    with pytest.raises(InvalidRequest) as caught:
        request_from({**given, "init_image": str(tmp_path / "none.png")})
    assert caught.value.field == "init_image"


async def test_few_pictures_are_decoded_at_a_time_however_many_come(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    decoding: list[int] = []
    may_end = threading.Event()

    def fitted(data: bytes, width: int, height: int) -> bytes:
        decoding.append(1)
        may_end.wait(30)
        return data

    monkeypatch.setattr(inputs_module, "fitted", fitted)
    inputs = inputs_module.Inputs(store)
    jobs = [new_job_id() for _ in range(6)]
    keeping = [asyncio.create_task(inputs.keep(job, "default", b"PNG", 16, 16)) for job in jobs]
    await until(lambda: len(decoding) == 2)
    # Whoever else could begin would, in threads that have nothing else to do.
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.run_in_executor(None, time.monotonic) for _ in range(3)))
    assert len(decoding) == 2
    may_end.set()
    await asyncio.gather(*keeping)
    assert len(decoding) == 6
