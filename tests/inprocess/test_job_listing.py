"""A tenant's jobs, newest first, page by page: on a real store and in memory."""

from __future__ import annotations

import time

import httpx
import pytest

from serve.attachment import Attachment
from serve.config import StorageSettings
from serve.endings import outcome
from serve.errors import InvalidRequest
from serve.http.native import build_app
from serve.job_ids import new_job_id
from serve.job_listing import JobListing
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.listing_keys import job_of, listing_key
from serve.pipeline import Pipeline
from serve.record_store import MemoryStore
from serve.requests import JobRecord
from serve.storage import ObjectStore
from serve.sweep import Sweep
from tests.inprocess.stand_in_stages import REQUEST, StandIn, new_pipeline

DAY_S = 86_400.0


@pytest.fixture(params=["store", "memory"])
def pipeline(
    request: pytest.FixtureRequest,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> Pipeline:
    journal = JournalSettings(enabled=request.param == "store")
    return new_pipeline(stages, storage, monkeypatch, journal=journal)


async def all_of(pipeline: Pipeline, tenant: str, limit: int) -> list[JobRecord]:
    found: list[JobRecord] = []
    after = None
    while True:
        page = await pipeline.jobs(tenant, limit, after)
        assert len(page.jobs) <= limit
        found += page.jobs
        if page.next is None:
            return found
        after = page.next


async def test_pages_are_newest_first_and_of_one_tenant(pipeline: Pipeline, stages: StandIn):
    own: list[str] = []
    for number in range(5):
        request = REQUEST.model_copy(update={"seed": number})
        # Of every other one its door keeps a list as well.
        door = Attachment(b"x", is_listed=number % 2 == 0)
        job, _ = await pipeline.submit_once(request, "acme", door)
        assert (await outcome(pipeline.events(job.id, "acme"))).images
        own.insert(0, job.id)
        await pipeline.generate(request, "acme-2")
    stages.gate.clear()
    running = (await pipeline.submit(REQUEST, "acme")).id
    for limit in (1, 2, 3, 6, 7, 100):
        found = await all_of(pipeline, "acme", limit)
        assert [record.id for record in found] == [running, *own]
    assert [record.status for record in found] == ["running"] + ["succeeded"] * 5
    assert all(image.url for record in found[1:] for image in record.result.images)  # type: ignore[union-attr]
    assert len(await all_of(pipeline, "acme-2", 100)) == 5
    assert await all_of(pipeline, "default", 100) == []
    await pipeline.cancel(running, "acme")
    assert [event async for event in pipeline.events(running, "acme")][-1].event == "cancelled"
    assert (await all_of(pipeline, "acme", 100))[0].status == "cancelled"
    # A job accepted meanwhile moves no page.
    first = await pipeline.jobs("acme", 3)
    await pipeline.submit(REQUEST, "acme")
    second = await pipeline.jobs("acme", 3, first.next)
    assert [record.id for record in (*first.jobs, *second.jobs)] == [running, *own]


async def test_deleted_swept_and_never_accepted_jobs_are_not_listed(
    stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = new_pipeline(stages, storage, monkeypatch)
    store = ObjectStore(storage)
    kept, deleted = [(await pipeline.generate(REQUEST)).id for _ in range(2)]
    await pipeline.delete(deleted)
    # Its Pipeline died before it was accepted; another job's record is not ours to read.
    ghost, foreign = new_job_id(), new_job_id()
    record = JobRecord(id=ghost, status="pending", request=REQUEST)
    await store.put(f"jobs/{ghost}/request.json", record.model_dump_json().encode(), "x")
    await store.put(f"jobs/{foreign}/result.json", b"no record", "x")
    for job_id in (ghost, foreign, orphan := new_job_id()):
        await store.put(listing_key(job_id, "default"), b"{}", "x")
    assert [each.id for each in await all_of(pipeline, "default", 1)] == [kept]
    listed = {job_of(key) for key in await store.list_keys("listing/")}
    assert listed == {kept, ghost, foreign, orphan}
    await Sweep(store, store, 30 * DAY_S, time.time() + DAY_S).run()
    assert {job_of(key) for key in await store.list_keys("listing/")} == {kept, ghost, foreign}
    await Sweep(store, store, 30 * DAY_S, time.time() + 31 * DAY_S).run()
    assert await store.list_keys("listing/") == []


async def test_whose_another_processs_job_is_is_asked_once(monkeypatch: pytest.MonkeyPatch):
    store = MemoryStore()
    journal = JobJournal(store)
    for tenant in ["globex"] * 20 + ["acme"]:
        await journal.accept(new_job_id(), REQUEST, "elsewhere-1", tenant)
    listing = JobListing(store, journal, {}, durable=True)
    read, asked = store.get, []

    async def counted(key: str) -> bytes | None:
        asked.append(key)
        return await read(key)

    monkeypatch.setattr(store, "get", counted)
    for most in (3 * 21, 3):
        asked.clear()
        (own,) = await listing.under_way("acme")
        assert own.tenant == "acme"
        assert len(asked) <= most
    assert len(await listing.under_way("globex")) == 20


async def test_what_is_no_page_is_refused(pipeline: Pipeline):
    transport = httpx.ASGITransport(build_app(pipeline), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        assert (await http.get("/v1/jobs")).json() == {"jobs": [], "next": None}
        for query, field in (
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=-1", "limit"),
            ("limit=1e1", "limit"),
            ("limit=", "limit"),
            ("after=", "after"),
            ("after=../../jobs", "after"),
        ):
            answer = await http.get(f"/v1/jobs?{query}")
            assert (answer.status_code, answer.json()["error"]["field"]) == (400, field), query
    with pytest.raises(InvalidRequest):
        await pipeline.jobs("not/a/tenant")
