"""Idempotency keys on a real store: one key is one job, whoever asks and however often."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serve.config import StorageSettings
from serve.errors import (
    IdempotencyConflict,
    InvalidRequest,
    JobCancelled,
    Overloaded,
    RecordUnreadable,
    StageFailed,
    StorageUnavailable,
)
from serve.http.native import build_app
from serve.idempotency import Idempotency
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.pipeline import Pipeline
from serve.requests import GenerateRequest, JobRecord
from serve.storage import ObjectStore
from tests.inprocess.stand_in_stages import StandIn, follow, new_pipeline

KEY = "order-17"
ASKED = GenerateRequest(prompt="a", idempotency_key=KEY)


@pytest.fixture
def other(stages: StandIn, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return new_pipeline(stages, storage, monkeypatch)


def client(pipeline: Pipeline) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(pipeline))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


async def test_all_who_send_one_key_at_once_get_one_job(
    pipeline: Pipeline, other: Pipeline, stages: StandIn, storage: StorageSettings
):
    records = await asyncio.gather(
        *(each.submit(ASKED) for each in (pipeline, other) for _ in range(4))
    )
    (job_id,) = {record.id for record in records}
    results = await asyncio.gather(pipeline.generate(ASKED), other.generate(ASKED))
    assert {result.id for result in results} == {job_id}
    assert [job.job_id for job in stages.denoised] == [job_id], "made once"
    assert await JobJournal(ObjectStore(storage)).pending() == []
    streamed = [event async for event in other.stream(ASKED)]
    assert streamed[-1].id == job_id
    assert streamed[-1].result is not None


async def test_another_request_under_the_key_is_a_conflict(pipeline: Pipeline, other: Pipeline):
    first = await pipeline.submit(ASKED)
    spelt_out = ASKED.model_copy(update={"num_images": 1, "output_format": "png"})
    assert (await other.submit(spelt_out)).id == first.id, "the same, with a default spelt out"
    for changed in ({"prompt": "b"}, {"seed": 1}):
        with pytest.raises(IdempotencyConflict) as caught:
            await other.submit(ASKED.model_copy(update=changed))
        assert (caught.value.status, caught.value.field) == (409, "idempotency_key")
    assert (await pipeline.submit(ASKED.model_copy(update={"idempotency_key": "b"}))).id != first.id


async def test_a_key_whose_pipeline_died_before_the_job_was_written(
    pipeline: Pipeline, storage: StorageSettings
):
    job_id = new_job_id()
    await Idempotency(ObjectStore(storage)).remember(ASKED, job_id, 123)
    result = await pipeline.generate(ASKED)
    assert (result.id, result.images[0].seed) == (job_id, 123)
    assert result.request.idempotency_key is None, "sending it again makes the pictures again"


async def test_a_key_whose_pipeline_died_before_the_job_was_pending(
    pipeline: Pipeline, other: Pipeline, storage: StorageSettings, stages: StandIn
):
    store = ObjectStore(storage)
    journal, job_id = JobJournal(store), new_job_id()
    await Idempotency(store).remember(ASKED, job_id, 123)
    bare = ASKED.model_copy(update={"idempotency_key": None, "seed": 123})
    # By a Pipeline with other defaults than ours.
    wrote = pipeline.spec.resolve(bare.model_copy(update={"num_inference_steps": 3}))
    await journal.accept(job_id, wrote)
    await journal.forget_pending(job_id)
    records = await asyncio.gather(*(each.submit(ASKED) for each in (pipeline, other)))
    assert {record.id for record in records} == {job_id}
    for each in (pipeline, other):
        events = await asyncio.wait_for(follow(each, job_id), 10)
        assert events[-1].result is not None
        assert events[-1].result.request == wrote
    assert len(stages.denoised) == 1


async def test_who_sends_a_key_again_is_not_told_of_a_job_that_is_not_on_record(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    written, may_write = asyncio.Event(), asyncio.Event()
    tries: list[str] = []
    accept = JobJournal.accept

    async def accept_late(journal: JobJournal, job_id: str, *args: Any) -> bool:
        tries.append(job_id)
        written.set()
        await may_write.wait()
        if len(tries) == 1:
            raise StorageUnavailable("gone")
        return await accept(journal, job_id, *args)

    monkeypatch.setattr(JobJournal, "accept", accept_late)
    first = asyncio.create_task(pipeline.submit(ASKED))
    await written.wait()
    second = asyncio.create_task(pipeline.submit(ASKED))
    assert not (await asyncio.wait({second}, timeout=0.3))[0]
    may_write.set()
    with pytest.raises(StorageUnavailable):
        await first
    record = await second
    assert tries == [record.id, record.id]
    assert (await follow(pipeline, record.id))[-1].event == "stored"


async def test_keys_do_not_let_more_in_than_there_is_room_for(pipeline: Pipeline, stages: StandIn):
    stages.gate.clear()
    asked = [ASKED.model_copy(update={"idempotency_key": f"key-{i}"}) for i in range(12)]
    answers = await asyncio.gather(*map(pipeline.submit, asked), return_exceptions=True)
    assert sum(isinstance(answer, Overloaded) for answer in answers) == 9, "a room of three"
    stages.gate.set()
    for answer in answers:
        if isinstance(answer, JobRecord):
            assert (await follow(pipeline, answer.id))[-1].event == "stored"
    assert (await pipeline.submit(asked[-1])).id, "what was refused may be sent again"


async def test_hanging_up_does_not_cancel_what_can_be_asked_for_again(
    pipeline: Pipeline, stages: StandIn
):
    stages.gate.clear()
    waiting = asyncio.create_task(pipeline.generate(ASKED))
    await stages.at_gate.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    stages.gate.set()
    assert (await pipeline.generate(ASKED)).images
    assert len(stages.denoised) == 1


async def test_a_key_stands_for_a_failure_or_a_cancellation_too(
    pipeline: Pipeline, other: Pipeline, stages: StandIn
):
    stages.error = ValueError("out of memory")
    for each in (pipeline, other, pipeline):
        with pytest.raises(StageFailed, match="out of memory"):
            await each.generate(ASKED)
    stages.error = None
    stages.gate.clear()
    second = ASKED.model_copy(update={"idempotency_key": "second"})
    job_id = (await pipeline.submit(second)).id
    await pipeline.cancel(job_id)
    assert (await follow(pipeline, job_id))[-1].event == "cancelled"
    with pytest.raises(JobCancelled):
        await other.generate(second)


async def test_what_was_refused_may_be_sent_again(pipeline: Pipeline):
    wrong = ASKED.model_copy(update={"shift": 1e-30})
    with pytest.raises(InvalidRequest):
        await pipeline.submit(wrong)
    assert (await pipeline.submit(ASKED)).id


async def test_the_header_is_the_field(pipeline: Pipeline, stages: StandIn):
    stages.gate.clear()
    async with client(pipeline) as http:
        headers = {"Idempotency-Key": KEY}
        first = await http.post("/v1/jobs", json={"prompt": "a"}, headers=headers)
        assert first.status_code == 202
        stages.gate.set()
        await follow(pipeline, first.json()["id"])
        for body in ({"prompt": "a"}, {"prompt": "a", "idempotency_key": KEY}):
            again = await http.post("/v1/jobs", json=body, headers=headers)
            assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
            assert again.headers["location"] == first.headers["location"]
        made = await http.post("/v1/generate", json={"prompt": "a"}, headers=headers)
        assert made.json()["id"] == first.json()["id"]
        conflict = await http.post("/v1/generate", json={"prompt": "b"}, headers=headers)
        assert conflict.status_code == 409
        assert conflict.json()["error"]["type"] == "IdempotencyConflict"


BAD: list[tuple[list[tuple[str, str]], dict[str, Any]]] = [
    ([("Idempotency-Key", "")], {}),
    ([("Idempotency-Key", "x" * 256)], {}),
    ([("Idempotency-Key", "a\tb")], {}),
    ([("Idempotency-Key", "a"), ("Idempotency-Key", "b")], {}),
    ([("Idempotency-Key", "a")], {"idempotency_key": "b"}),
    ([("Idempotency-Key", "a")], {"idempotency_key": 5}),
    ([], {"idempotency_key": "ключ"}),
    ([], {"idempotency_key": ["a"]}),
    ([], {"idempotency_key": "a\n"}),
]


@pytest.mark.parametrize(("headers", "fields"), BAD)
async def test_bad_keys(pipeline: Pipeline, headers: list[tuple[str, str]], fields: dict[str, Any]):
    async with client(pipeline) as http:
        answer = await http.post("/v1/jobs", json={"prompt": "a"} | fields, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["field"] == "idempotency_key"
    assert answer.json()["error"]["allowed"]


@pytest.mark.parametrize("data", [b"", b"[]", b'{"id": "x"}', b"\xff", b"null"])
async def test_a_key_whose_record_somebody_else_wrote(
    pipeline: Pipeline, storage: StorageSettings, data: bytes
):
    store = ObjectStore(storage)
    await Idempotency(store).remember(ASKED, new_job_id(), 1)
    (key,) = await store.list_keys("idempotency/")
    assert KEY not in key
    await store.put(key, data, "application/json")
    with pytest.raises(RecordUnreadable):
        await pipeline.submit(ASKED)
