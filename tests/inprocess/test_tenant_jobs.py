"""What is one tenant's no other tenant finds, holds up or names."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from serve.config import StorageSettings
from serve.errors import JobNotFound
from serve.http.native import build_app
from serve.job_ids import new_job_id
from serve.key_store import FileKeys
from serve.pipeline import Pipeline
from serve.storage import ObjectStore
from tests.inprocess.gated import JOB, calls, client, is_refusal, made, needing_keys, with_http


@pytest.fixture
def pipeline(tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return needing_keys(storage, monkeypatch, tmp_path)


async def test_no_tenant_finds_what_is_anothers(
    pipeline: Pipeline, keys: FileKeys, storage: StorageSettings
):
    app = build_app(pipeline)
    own, _ = await made(keys, "acme")
    other, _ = await made(keys, "globex", "generate", "admin")
    stages: Any = pipeline._models.own.stages.pools["denoise"]["narrow"]
    async with client(app, own) as http:
        done = (await http.post("/v1/generate", json=JOB)).json()
        stages.gate.clear()
        running = (await http.post("/v1/jobs", json=JOB)).json()
    assert running["tenant"] == "acme"
    unknown = new_job_id()
    tried = 0
    for job_id in (done["id"], running["id"]):
        for method, path in calls(app, job_id):
            if job_id not in path:
                continue
            for query in ("", "?purge=true"):
                async with client(app, other) as http:
                    answer = await http.request(method, path + query)
                    nothing = await http.request(method, path.replace(job_id, unknown) + query)
                assert answer.status_code == nothing.status_code == 404, (method, path)
                assert answer.text == nothing.text.replace(unknown, job_id)
                tried += 1
    assert tried >= 12
    # Nor does who needs no key elsewhere, or calls by handle for another tenant.
    for tenant in ("default", "globex"):
        for call in (pipeline.job, pipeline.cancel, pipeline.delete):
            with pytest.raises(JobNotFound):
                await call(running["id"], tenant)
        with pytest.raises(JobNotFound):
            await anext(pipeline.events(running["id"], tenant))
    stages.gate.set()
    async with client(app, own) as http:
        assert (await http.get(f"/v1/jobs/{done['id']}")).json()["status"] == "succeeded"
        told = await http.get(f"/v1/jobs/{running['id']}/events")
        assert '"event":"stored"' in told.text
        record = (await http.get(f"/v1/jobs/{running['id']}")).json()
        assert (record["status"], record["tenant"]) == ("succeeded", "acme")
        (image,) = record["result"]["images"]
        assert f"/images/acme/{running['id']}/0-" in image["s3_uri"]
        assert (await http.delete(f"/v1/jobs/{running['id']}?purge=true")).status_code == 200
        assert (await http.get(f"/v1/jobs/{running['id']}")).status_code == 404
    store = ObjectStore(storage)
    left = await store.list_keys("images/acme/")
    store.close()
    assert [key.split("/")[2] for key in left] == [done["id"]]


async def test_no_tenant_can_hold_all_calls(
    keys: FileKeys, tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = with_http(storage, monkeypatch, tmp_path, most_calls=6, host="0.0.0.0")
    app = build_app(pipeline)
    stages: Any = pipeline._models.own.stages.pools["denoise"]["narrow"]
    stages.gate.clear()
    greedy, modest = (await made(keys, "acme"))[0], (await made(keys, "globex"))[0]
    # One job, and many who wait for it.
    asked = JOB | {"idempotency_key": "k"}
    async with client(app, greedy) as http, client(app, modest) as other:
        waiting = [asyncio.create_task(http.post("/v1/generate", json=asked)) for _ in range(9)]
        refused, held = await asyncio.wait(waiting, timeout=5, return_when=asyncio.ALL_COMPLETED)
        assert len(held) == 3
        for answer in (task.result() for task in refused):
            assert is_refusal(answer, 429)
            assert int(answer.headers["retry-after"]) > 0
        assert (await other.get("/v1/models")).status_code == 200
        assert is_refusal(await http.get("/v1/models"), 429)
        assert (await http.get("/healthz")).status_code == 200
        (job_id,) = pipeline._live
        assert (await http.delete(f"/v1/jobs/{job_id}")).status_code == 200
        assert {(await task).status_code for task in held} == {409}
        assert (await http.get("/v1/models")).status_code == 200


async def test_no_tenant_can_fill_the_memory_with_bodies(
    keys: FileKeys, tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    pipeline = with_http(storage, monkeypatch, tmp_path, largest_body=1024, host="0.0.0.0")
    app, rest = build_app(pipeline), asyncio.Event()
    greedy, modest = (await made(keys, "acme"))[0], (await made(keys, "globex"))[0]

    async def slowly() -> AsyncIterator[bytes]:
        yield b" " * 1000
        await rest.wait()
        yield b"{}"

    async with client(app, greedy) as http, client(app, modest) as other:
        waiting = [asyncio.create_task(http.post("/v1/jobs", content=slowly())) for _ in range(20)]
        # Of room for sixteen as much as is left free.
        for answered in itertools.islice(asyncio.as_completed(waiting), 12):
            answer = await answered
            assert is_refusal(answer, 429)
            assert int(answer.headers["retry-after"]) > 0
        assert (await other.post("/v1/jobs", json=JOB)).status_code == 202
        rest.set()
        answers = [await each for each in waiting]
        assert sorted(answer.status_code for answer in answers) == [400] * 8 + [429] * 12
        for _ in range(9):
            assert (await http.post("/v1/jobs", content=b" " * 1000 + b"{}")).status_code == 400


async def test_an_idempotency_key_is_its_tenants_own(pipeline: Pipeline, keys: FileKeys):
    app = build_app(pipeline)
    asked = JOB | {"idempotency_key": "order-17"}
    ids: dict[str, str] = {}
    for tenant in ("acme", "globex"):
        key, _ = await made(keys, tenant)
        async with client(app, key) as http:
            ids[tenant] = (await http.post("/v1/generate", json=asked)).json()["id"]
            again = (await http.post("/v1/generate", json=asked)).json()["id"]
            assert again == ids[tenant]
    assert len(set(ids.values())) == 2


async def test_a_body_cannot_say_whose_it_is(pipeline: Pipeline, keys: FileKeys):
    key, _ = await made(keys, "acme")
    async with client(build_app(pipeline), key) as http:
        answer = await http.post("/v1/generate", json=JOB | {"tenant": "globex"})
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == "tenant"
