"""What a tenant may use: limits, its share of the room and of the denoisers, and the account."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from PIL import Image

from serve.config import PoolSettings, StorageSettings
from serve.errors import LimitReached, Overloaded
from serve.http.native import build_app
from serve.metrics import Metrics
from serve.pipeline import Pipeline
from serve.requests import GenerateRequest
from serve.running import RunningJob
from serve.tenant_book import TenantBook
from serve.tenant_settings import NamedTenant, TenantSettings
from tests.inprocess.polling import until
from tests.inprocess.stand_in_stages import LATENTS, REQUEST, StandIn, new_pipeline

WIDE = (PoolSettings(name="wide", max_ongoing_requests=20, max_queued_requests=0),)


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def with_limits(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch, **limits: Any
) -> Pipeline:
    return new_pipeline(
        stages,
        storage,
        monkeypatch,
        tenants=TenantSettings(**limits),
        denoiser=WIDE,
        vae_decoder=(WIDE[0].model_copy(update={"name": "wide-too"}),),
    )


def images(number: int) -> GenerateRequest:
    return GenerateRequest(prompt="a", seed=5, num_images=number)


def test_a_rate_says_when_to_come_again_and_it_is_true() -> None:
    clock = Clock()
    book = TenantBook(TenantSettings(images_per_minute=30), 1, Metrics(), clock)
    book.take("acme", 16, ())
    book.take("acme", 14, ())
    with pytest.raises(LimitReached) as caught:
        book.take("acme", 4, ())
    assert caught.value.retry_after_s == pytest.approx(8.0)
    book.take("globex", 16, ())  # a bucket of its own
    clock.now += caught.value.retry_after_s or 0
    book.take("acme", 4, ())
    book.give_back("acme", 4)
    book.take("acme", 4, ())


def test_several_pipelines_grant_their_part() -> None:
    settings = TenantSettings(
        images_per_minute=60, named=(NamedTenant(name="big", images_per_minute=600, max_jobs=3),)
    )
    book = TenantBook(settings, 2, Metrics(), Clock())
    book.take("acme", 16, ())
    book.take("acme", 14, ())
    with pytest.raises(LimitReached) as caught:
        book.take("acme", 1, ())
    assert caught.value.allowed == "30 a minute here, of 60 in all"
    live = [RunningJob(str(number), REQUEST, tenant="big") for number in range(2)]
    book.take("big", 16, live[:1])
    with pytest.raises(LimitReached) as caught:
        book.take("big", 16, live)
    assert caught.value.allowed == "at most 2 at a time here, of 3 in all"
    assert (caught.value.retry_after_s or 0) >= 1


def test_start_images_sent_beforehand_are_limited_by_their_size() -> None:
    clock, mib = Clock(), 1 << 20
    book = TenantBook(TenantSettings(upload_mib_per_minute=120), 1, Metrics(), clock)
    book.take_upload("acme", 119 * mib)
    with pytest.raises(LimitReached) as caught:
        book.take_upload("acme", 5 * mib)
    assert caught.value.field == "upload_mib_per_minute"
    assert caught.value.retry_after_s == pytest.approx(2.0)
    book.take_upload("other", 5 * mib)
    clock.now += 2.0
    book.take_upload("acme", 5 * mib)


async def test_both_ways_of_sending_a_start_image_count(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = with_limits(StandIn(), storage, monkeypatch, upload_mib_per_minute=1)
    file = png_of(20 << 20)
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        for _ in range(2):
            kept = await http.post("/upload/image", files={"image": ("a.png", file)})
            assert kept.status_code == 200, kept.text
        assert (await http.post("/v1/uploads", content=file)).status_code == 201
        refused = await http.post("/upload/image", files={"image": ("a.png", file)})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 60
        assert (await http.post("/v1/uploads", content=file)).status_code == 429


def png_of(size: int) -> bytes:
    """Return a small picture in a large file: a chunk that means nothing makes it long."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    small = buffer.getvalue()
    padding = b"paDd" + bytes(size)
    chunk = struct.pack(">I", size) + padding + struct.pack(">I", zlib.crc32(padding))
    return small[:33] + chunk + small[33:]


async def test_jobs_at_a_time_are_limited_over_http_with_a_typed_429(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = with_limits(stages, storage, monkeypatch, max_jobs=2)
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        body = {"prompt": "a"}
        ids = [(await http.post("/v1/jobs", json=body)).json()["id"] for _ in range(2)]
        refused = await http.post("/v1/jobs", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "limit_reached")
        assert int(refused.headers["retry-after"]) >= 1
        stages.gate.set()
        await until(lambda: not pipeline._live)
        assert (await http.post("/v1/generate", json=body)).status_code == 200
        assert (await http.get(f"/v1/jobs/{ids[0]}")).json()["status"] == "succeeded"


async def test_what_is_refused_otherwise_does_not_count(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = with_limits(StandIn(), storage, monkeypatch, images_per_minute=1)

    async def broken(*_: Any) -> Any:
        raise Overloaded("no")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._journal, "accept", broken)
        for _ in range(3):
            with pytest.raises(Overloaded):
                await pipeline.submit(images(16))
    await pipeline.generate(images(16))
    with pytest.raises(LimitReached):
        await pipeline.generate(images(1))


async def test_one_tenant_never_fills_the_room(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = with_limits(stages, storage, monkeypatch)
    await pipeline.submit(images(10), "acme")
    with pytest.raises(Overloaded):
        await pipeline.submit(images(1), "acme")
    await pipeline.submit(images(5), "globex")
    with pytest.raises(Overloaded):
        await pipeline.submit(images(1), "globex")
    await pipeline.submit(images(2), "initech")
    stages.gate.set()
    await until(lambda: not pipeline._live)
    # Alone, and without a name, it may have all of it.
    await pipeline.generate(images(16))
    stages.gate.clear()
    await pipeline.submit(images(16))
    await pipeline.submit(images(4))
    stages.gate.set()
    await until(lambda: not pipeline._live)


async def test_who_finds_no_room_is_told_when_a_job_usually_ends(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    stages = StandIn()
    pipeline = with_limits(stages, storage, monkeypatch)
    pipeline._book.ended(RunningJob("1", REQUEST, age_s=40.0), "stored")
    stages.gate.clear()
    await pipeline.submit(images(16))
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        refused = await http.post("/v1/jobs", json={"prompt": "a", "num_images": 16})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert 30 <= int(refused.headers["retry-after"]) <= 40
    stages.gate.set()
    await until(lambda: not pipeline._live)


class OneByOne(StandIn):
    """A denoiser that does a picture for each ticket, the first step included."""

    def __init__(self) -> None:
        super().__init__()
        self.tickets = asyncio.Semaphore(0)

    async def _denoise(self, job: Any) -> AsyncIterator[Any]:
        self.denoised.append(job)
        await self.tickets.acquire()
        yield (*self.steps, LATENTS)


async def test_a_late_tenant_is_served_before_the_rest_of_a_flood(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    stages = OneByOne()
    pipeline = with_limits(stages, storage, monkeypatch)
    flood = await pipeline.submit(images(10), "acme")
    await until(lambda: len(stages.denoised) == 4)
    late = await pipeline.submit(images(1), "globex")
    await until(lambda: pipeline._models.own.production._share.waiting == 7)
    for _ in range(2):
        stages.tickets.release()
    await until(lambda: late.id in [job.job_id for job in stages.denoised])
    assert len(stages.denoised) <= 6
    for _ in range(9):
        stages.tickets.release()
    await until(lambda: not pipeline._live)
    assert (await pipeline.job(flood.id, "acme")).status == "succeeded"
    assert (await pipeline.job(late.id, "globex")).status == "succeeded"


async def test_the_account_of_a_tenant(storage: StorageSettings, monkeypatch: pytest.MonkeyPatch):
    stages = StandIn()
    stages.latents = [replace(LATENTS, cool_s=2.5, joules=7.0)]
    pipeline = with_limits(stages, storage, monkeypatch)
    metered: Counter[str] = Counter()

    def meter(tenant: str, seconds: float) -> None:
        metered[tenant] += seconds  # type: ignore[assignment]

    monkeypatch.setattr(pipeline._metrics, "gpu_seconds", meter)
    await pipeline.generate(images(3), "acme")
    stages.error = ValueError("no")
    with pytest.raises(Exception, match="no"):
        await pipeline.generate(images(1), "acme")
    stages.error = None
    used = await pipeline.usage("acme")
    # Text twice, three pictures of 2.5 s and their decoding, and one step that came to nothing.
    assert used["gpu_seconds"] == pytest.approx(2 * 0.2 + 3 * (2.5 + 0.1) + 0.1)
    assert metered == {"acme": pytest.approx(used["gpu_seconds"])}
    assert (used["images"], used["joules"]) == (3, 21.0)
    assert (used["jobs_succeeded"], used["jobs_failed"], used["jobs_cancelled"]) == (1, 1, 0)
    assert (await pipeline.usage("globex"))["gpu_seconds"] == 0.0
    stages.gate.clear()
    job = await pipeline.submit(images(1), "globex")
    await pipeline.cancel(job.id, "globex")
    await until(lambda: not pipeline._live)
    assert (await pipeline.usage("globex"))["jobs_cancelled"] == 1
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        own = (await http.get("/v1/usage")).json()
    assert own["tenant"] == "default"
    assert own["images"] == 0
