"""Deleting jobs and sweeping old ones, on a real store; what lives is never touched."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve import endings as endings_module
from serve.__main__ import main
from serve.commands.sweep import seconds_of
from serve.config import StorageSettings
from serve.embedded_store import EmbeddedStore
from serve.errors import (
    IdempotencyConflict,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    StorageUnavailable,
)
from serve.http.native import build_app
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.pipeline import Pipeline
from serve.requests import JobRecord
from serve.storage import ObjectStore
from serve.sweep import Sweep, Swept
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline

DAY_S = 86_400.0


def sweep(store: ObjectStore, *, days_on: float, older_than_s: float = 30 * DAY_S) -> Sweep:
    """A sweep that takes place some days from now."""
    return Sweep(store, store, older_than_s, time.time() + days_on * DAY_S)


async def folders(store: ObjectStore) -> set[str]:
    return {key.split("/")[0] for key in await store.list_keys("")}


async def test_a_deleted_job_is_gone_with_its_pictures(pipeline: Pipeline, store: ObjectStore):
    asked = REQUEST.model_copy(update={"num_images": 2, "idempotency_key": "k"})
    other = await pipeline.generate(REQUEST)
    result = await pipeline.generate(asked)
    deleted = await pipeline.delete(result.id)
    assert deleted.status == "succeeded"
    for call in (pipeline.job, pipeline.cancel, pipeline.delete):
        with pytest.raises(JobNotFound):
            await call(result.id)
    assert await store.list_keys(f"images/{result.id}/") == []
    assert await store.list_keys(f"jobs/{result.id}/") == [f"jobs/{result.id}/result.json"]
    assert httpx.get(result.images[0].url, trust_env=False).status_code == 404
    assert httpx.get(other.images[0].url, trust_env=False).status_code == 200
    with pytest.raises(IdempotencyConflict, match="deleted"):
        await pipeline.submit(asked)
    # Whoever still worked on it cannot bring it back.
    late = JobRecord(id=result.id, status="succeeded", request=REQUEST, result=result)
    assert not await JobJournal(store).publish(result.id, late)
    assert await JobJournal(store).read(result.id) is None


async def test_who_interrupts_all_takes_no_notice_of_what_is_deleted_meanwhile(
    pipeline: Pipeline, stages: StandIn, monkeypatch: pytest.MonkeyPatch
):
    stages.gate.clear()
    deleted, other = [(await pipeline.submit(REQUEST)).id for _ in range(2)]
    under_way = pipeline.under_way

    async def then_deleted(tenant: str) -> list[JobRecord]:
        found = await under_way(tenant)
        await pipeline.delete(deleted, tenant)
        return found

    monkeypatch.setattr(pipeline, "under_way", then_deleted)
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        assert (await http.post("/sdapi/v1/interrupt")).status_code == 200
    assert (await pipeline.job(other)).status == "cancelled"


@pytest.mark.parametrize("at", [0, 1, 2, 3])
async def test_a_deletion_that_broke_off_goes_on_when_it_is_asked_for_again(
    pipeline: Pipeline, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, at: int
):
    result = await pipeline.generate(REQUEST.model_copy(update={"num_images": 2}))
    tries, delete = itertools.count(), pipeline._store.delete

    async def delete_some(key: str) -> None:
        if next(tries) >= at:
            raise StorageUnavailable("gone")
        await delete(key)

    monkeypatch.setattr(pipeline._store, "delete", delete_some)
    with pytest.raises(StorageUnavailable):
        await pipeline.delete(result.id)
    monkeypatch.setattr(pipeline._store, "delete", delete)
    with pytest.raises(JobNotFound):
        await pipeline.job(result.id)
    with pytest.raises(JobNotFound):
        await pipeline.delete(result.id, "somebody-else")
    assert (await pipeline.delete(result.id)).id == result.id
    left = [key for key in await store.list_keys("") if not key.startswith("leases/")]
    assert left == [f"jobs/{result.id}/result.json"]
    with pytest.raises(JobNotFound):
        await pipeline.delete(result.id)


async def test_nobody_follows_what_another_pipeline_deleted(
    pipeline: Pipeline,
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
):
    result = await pipeline.generate(REQUEST)
    await new_pipeline(stages, storage, monkeypatch).delete(result.id)
    with pytest.raises(JobNotFound):
        await follow(pipeline, result.id)


async def test_a_running_job_is_cancelled_and_deleted(
    pipeline: Pipeline, stages: StandIn, store: ObjectStore
):
    stages.gate.clear()
    job_id = (await pipeline.submit(REQUEST)).id
    following = asyncio.create_task(follow(pipeline, job_id))
    await stages.at_gate.wait()
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        for wrong in ("yes", "", "1"):
            answer = await http.delete(f"/v1/jobs/{job_id}", params={"purge": wrong})
            assert (answer.status_code, answer.json()["error"]["field"]) == (400, "purge")
        answer = await http.delete(f"/v1/jobs/{job_id}?purge=true")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert (await following)[-1].event == "cancelled"
        assert (await http.get(f"/v1/jobs/{job_id}")).status_code == 404
        assert (await http.delete(f"/v1/jobs/{job_id}?purge=true")).status_code == 404
    assert await JobJournal(store).pending() == []


@pytest.mark.parametrize("first_learns", ["that it is cancelled", "that it cannot publish"])
async def test_who_waits_for_a_job_that_another_pipeline_deletes_is_told_of_a_cancellation(
    pipeline: Pipeline,
    stages: StandIn,
    storage: StorageSettings,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    first_learns: str,
):
    other = new_pipeline(stages, storage, monkeypatch)
    is_asked = first_learns == "that it is cancelled"
    # Long enough for all of the job's records to be gone by then.
    monkeypatch.setattr(endings_module, "_CANCEL_POLL_S", 0.5 if is_asked else 3600.0)
    stages.gate.clear()
    waiting = asyncio.create_task(pipeline.generate(REQUEST))
    await stages.at_gate.wait()
    (job_id,) = await JobJournal(store).pending()
    await other.delete(job_id)
    if not is_asked:
        stages.gate.set()
    with pytest.raises(JobCancelled):
        await waiting


async def test_old_jobs_go_and_young_or_pending_ones_stay(pipeline: Pipeline, store: ObjectStore):
    asked = REQUEST.model_copy(update={"idempotency_key": "k"})
    result = await pipeline.generate(asked)
    journal = JobJournal(store)
    await journal.accept(waits := new_job_id(), REQUEST, "somebody-1")
    before = await store.list_keys("")
    early = await sweep(store, days_on=29).run(dry=True)
    assert (early.jobs, early.pictures_of_jobs, early.idempotency_keys) == (0, 0, 0)
    assert (await sweep(store, days_on=31).run(dry=True)).jobs == 1
    # The lease is not renewed on the day of the sweep, in this process's time.
    leases = [key for key in before if key.startswith("leases/")]
    assert await store.list_keys("") == before
    swept = await sweep(store, days_on=31).run()
    assert (swept.jobs, swept.pictures_of_jobs, swept.idempotency_keys) == (1, 1, 1)
    assert swept.leases == len(leases)
    assert swept.bytes > result.images[0].size_bytes
    assert await folders(store) == {"jobs", "listing", "pending"}
    assert await journal.pending() == [waits]
    assert await journal.read(result.id) is None
    assert (await journal.read(waits)) is not None


async def test_pictures_that_no_result_names_go_after_an_hour(
    pipeline: Pipeline, store: ObjectStore
):
    result = await pipeline.generate(REQUEST)
    journal = JobJournal(store)
    await journal.accept(waits := new_job_id(), REQUEST, "somebody-1")
    gone = new_job_id()
    named = (await store.list_keys(f"images/{result.id}/"))[0]
    strays = [
        JobJournal.image_key(job_id, 0, "0" * 64, "png") for job_id in (result.id, waits, gone)
    ]
    for key in strays:
        await store.put(key, b"PNG", "image/png")
    assert await sweep(store, days_on=0).run() == Swept()
    swept = await sweep(store, days_on=0.05).run()
    assert (swept.unreferenced_pictures, swept.jobs) == (2, 0)
    assert sorted(await store.list_keys("images/")) == sorted([named, strays[1]])


@pytest.mark.parametrize("result", [b"{", b"[]", b'{"result": {"images": [5]}}'])
async def test_records_that_cannot_be_read_keep_their_pictures_until_they_are_old(
    store: ObjectStore, result: bytes
):
    job_id = new_job_id()
    key = JobJournal.image_key(job_id, 0, "0" * 64, "png")
    await store.put(f"jobs/{job_id}/result.json", result, "application/json")
    await store.put(key, b"PNG", "image/png")
    await store.put("jobs/strange/file", b"", "text/plain")
    assert await sweep(store, days_on=1).run() == Swept()
    swept = await sweep(store, days_on=31).run()
    assert (swept.jobs, swept.pictures_of_jobs) == (1, 1)
    assert await store.list_keys("") == ["jobs/strange/file"]


async def test_a_job_being_accepted_is_not_swept(store: ObjectStore):
    await store.put(f"jobs/{new_job_id()}/request.json", b"{}", "application/json")
    assert await sweep(store, days_on=0, older_than_s=0.0).run() == Swept()
    assert (await sweep(store, days_on=0.05, older_than_s=0.0).run()).jobs == 1


@pytest.mark.parametrize("age", ["", "30", "d", "-1d", "1.5d", "30 d", "9" * 12 + "d", "1w"])
def test_ages_that_cannot_be_read(age: str):
    with pytest.raises(InvalidRequest):
        seconds_of(age)


def test_the_command(storage: StorageSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "kelvin.yaml"
    config.write_text(yaml.safe_dump({"storage": storage.model_dump()}))
    store = ObjectStore(storage)
    key = f"jobs/{new_job_id()}/result.json"
    asyncio.run(store.put(key, b"{}", "application/json"))

    def swept(*options: str) -> dict[str, Any]:
        assert main(["sweep", "--config", str(config), "--json", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    assert swept("--older-than", "1d")["jobs"] == 0
    time.sleep(1.1)  # listings tell whole seconds
    assert swept("--older-than", "0s", "--dry-run")["jobs"] == 1
    assert asyncio.run(store.exists(key))
    assert swept("--older-than", "0s")["jobs"] == 1
    assert not asyncio.run(store.exists(key))
    assert main(["sweep", "--older-than", "soon", "--config", str(config)]) == 2
    nowhere = ["--set", f"embedded_store.data_dir={tmp_path / 'none'}"]
    assert main(["sweep", "--older-than", "1d", *nowhere]) == 2


def test_an_embedded_store_is_swept_whether_it_runs_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data_dir = ["--set", f"embedded_store.data_dir={tmp_path / 'data'}"]
    with EmbeddedStore(tmp_path / "data", "kelvin"):
        assert main(["sweep", "--older-than", "1d", "--json", *data_dir]) == 0
    assert main(["sweep", "--older-than", "1d", "--json", *data_dir]) == 0
