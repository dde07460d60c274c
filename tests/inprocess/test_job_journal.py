"""The job journal on a real S3 server: what is accepted stays, results are published once."""

import asyncio
import json
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.attachment import Attachment
from serve.errors import (
    JobConflict,
    JobNotFound,
    RecordUnreadable,
    StageFailed,
    StorageUnavailable,
)
from serve.job_ids import new_job_id, shard
from serve.jobs import JobJournal
from serve.removal import Removal
from serve.requests import (
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobEvent,
    JobRecord,
    StageReport,
)
from serve.storage import ObjectStore
from tests.inprocess.faulty_server import losing_first_answers, serving

_REQUEST = GenerateRequest(prompt="a red circle", seed=7, width=256, height=256)


def _succeeded(store: ObjectStore, job_id: str, *, seconds: float = 1.5) -> JobRecord:
    key = JobJournal.image_key(job_id, 0, "ab" * 32, "png")
    result = GenerateResult(
        id=job_id,
        model="pico",
        request=_REQUEST,
        images=(
            ImageRef(
                index=0,
                s3_uri=store.s3_uri(key),
                url=store.presign(key),
                sha256="ab" * 32,
                size_bytes=3,
                width=256,
                height=256,
                output_format="png",
                seed=7,
            ),
        ),
        stages=(
            StageReport(
                stage="text", replica="r", pid=1, precision="fp32", queue_s=0.0, seconds=0.1
            ),
        ),
        seconds=seconds,
        warnings=("truncated",),
    )
    last = JobEvent(event="stored", id=job_id, result=result)
    return JobRecord(id=job_id, status="succeeded", request=_REQUEST, result=result, progress=last)


async def test_accepted_job_is_pending_for_every_reader(journal, storage):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)
    elsewhere = JobJournal(ObjectStore(storage))
    record = await elsewhere.read(job_id)
    assert record == JobRecord(id=job_id, status="pending", request=_REQUEST)
    assert await elsewhere.pending() == [job_id]
    assert await elsewhere.pending(shard(job_id)) == [job_id]


async def test_layout(journal, store):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)
    assert await store.list_keys("") == [
        f"jobs/{job_id}/request.json",
        f"listing/default/{(1 << 128) - 1 - int(job_id, 16):032x}",
        f"pending/{shard(job_id)}/{job_id}",
    ]
    await journal.publish(job_id, _succeeded(store, job_id))
    assert await store.list_keys("") == [
        f"jobs/{job_id}/request.json",
        f"jobs/{job_id}/result.json",
        f"listing/default/{(1 << 128) - 1 - int(job_id, 16):032x}",
    ]
    assert JobJournal.image_key(job_id, 3, "0" * 64, "webp") == (
        f"images/{job_id}/3-{'0' * 64}.webp"
    )


async def test_what_is_kept_with_a_job_is_there_as_long_as_the_job(journal, store):
    job_id = new_job_id()
    workflow = json.dumps({"text": "x" * (4 << 20)}).encode()
    await journal.accept(job_id, _REQUEST, "p", "acme", Attachment(workflow))
    again = Attachment(b"another", is_listed=False)
    assert not await journal.accept(job_id, _REQUEST, "p", "acme", again)
    assert await journal.attached(job_id, "acme") == workflow
    assert await journal.attached(job_id, "globex") is None
    assert await journal.attached(new_job_id(), "acme") is None
    pending = JobRecord(id=job_id, tenant="acme", status="pending", request=_REQUEST)
    assert await journal.read(job_id) == pending
    sizes = {entry.key: entry.size for entry in await store.list_entries("")}
    assert [key for key, size in sizes.items() if size > 4096] == [f"jobs/{job_id}/request.json"]
    ended = await journal.request_cancel(job_id)
    assert await journal.read(job_id) == ended
    assert await journal.attached(job_id, "acme") == workflow
    await Removal(store, store).delete(job_id, "acme")
    assert await journal.attached(job_id, "acme") is None
    assert await store.list_keys("listing/") == []


async def test_accepting_again_is_the_same_job(journal):
    job_id = new_job_id()
    assert await journal.accept(job_id, _REQUEST, "pipeline-1")
    assert not await journal.accept(job_id, _REQUEST, "pipeline-2")
    assert await journal.accepted_by(job_id) == "pipeline-1"
    with pytest.raises(JobConflict):
        await journal.accept(job_id, _REQUEST.model_copy(update={"seed": 8}))
    assert await journal.read(job_id) == JobRecord(id=job_id, status="pending", request=_REQUEST)


async def test_result_comes_back_with_a_fresh_url(journal, store):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)
    published = _succeeded(store, job_id)
    await store.put(f"images/{job_id}/0-{'ab' * 32}.png", b"PNG", "image/png")
    assert await journal.publish(job_id, published)
    read = await journal.read(job_id)
    assert read is not None
    assert read.result is not None
    assert read.status == "succeeded"
    assert read.result.images[0].url.startswith(store.settings.endpoint_url)
    volatile: Any = {"progress": True, "result": {"images": {"__all__": {"url"}}}}
    assert read.model_dump(exclude=volatile) == published.model_dump(exclude=volatile)


async def test_no_presigned_url_is_stored(journal, store):
    job_id = new_job_id()
    await journal.publish(job_id, _succeeded(store, job_id))
    stored = await store.get(f"jobs/{job_id}/result.json")
    assert b"X-Amz" not in stored
    assert json.loads(stored)["result"]["images"][0]["s3_uri"].startswith("s3://")


async def test_failure_comes_back(journal):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)
    error = StageFailed("The denoiser made NaN.", field="guidance_scale", value=99.0).body()
    failed = JobRecord(id=job_id, status="failed", request=_REQUEST, error=error)
    assert await journal.publish(job_id, failed)
    assert await journal.read(job_id) == failed
    assert await journal.pending() == []


async def test_of_many_publishers_exactly_one_wins(storage):
    job_id = new_job_id()
    journals = [JobJournal(ObjectStore(storage)) for _ in range(4)]
    store = ObjectStore(storage)
    records = [_succeeded(store, job_id, seconds=float(number)) for number in range(12)]
    await journals[0].accept(job_id, _REQUEST)
    won = await asyncio.gather(
        *(journals[number % 4].publish(job_id, record) for number, record in enumerate(records))
    )
    assert won.count(True) == 1
    read = await journals[0].read(job_id)
    assert read is not None
    assert read.result is not None
    assert read.result.seconds == float(won.index(True))
    assert await journals[0].pending() == []


async def test_publisher_whose_answer_was_lost_still_wins(storage, store):
    job_id = new_job_id()
    with serving(losing_first_answers(storage.endpoint_url, 1)) as url:
        shaky = JobJournal(ObjectStore(storage.model_copy(update={"endpoint_url": url})))
        assert await shaky.publish(job_id, _succeeded(store, job_id))
    assert not await JobJournal(store).publish(job_id, _succeeded(store, job_id))


async def test_cancel_before_the_end_is_final(journal, store):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)
    assert not await journal.is_cancelled(job_id)
    cancelled = await journal.request_cancel(job_id)
    assert cancelled.status == "cancelled"
    assert await journal.is_cancelled(job_id)
    assert not await journal.publish(job_id, _succeeded(store, job_id))
    assert await journal.read(job_id) == cancelled
    assert await journal.request_cancel(job_id) == cancelled
    assert await journal.pending() == []


async def test_cancel_after_the_end_changes_nothing(journal, store):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)
    await journal.publish(job_id, _succeeded(store, job_id))
    assert (await journal.request_cancel(job_id)).status == "succeeded"
    assert not await journal.is_cancelled(job_id)


async def test_cancel_and_publish_at_the_same_time_agree(journal, store):
    for _ in range(5):
        job_id = new_job_id()
        await journal.accept(job_id, _REQUEST)
        cancelled, published = await asyncio.gather(
            journal.request_cancel(job_id), journal.publish(job_id, _succeeded(store, job_id))
        )
        read = await journal.read(job_id)
        assert read.status == cancelled.status == ("succeeded" if published else "cancelled")


async def test_cancel_that_died_half_way_is_finished_by_the_next_reader(journal, store):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)
    await store.put(f"jobs/{job_id}/cancel.json", b"{}", "application/json")
    assert (await journal.read(job_id)).status == "cancelled"
    assert not await journal.publish(job_id, _succeeded(store, job_id))
    assert (await journal.read(job_id)).status == "cancelled"


async def test_unknown_job(journal):
    job_id = new_job_id()
    assert await journal.read(job_id) is None
    assert not await journal.is_cancelled(job_id)
    with pytest.raises(JobNotFound):
        await journal.request_cancel(job_id)


_MALFORMED = st.one_of(
    st.text(max_size=64).filter(lambda text: len(text) != 32),
    st.text("0123456789ABCDEFg/.%", min_size=32, max_size=32).filter(
        lambda text: any(letter in "ABCDEFg/.%" for letter in text)
    ),
    st.sampled_from(["../x", "0" * 31 + "\n", "0" * 32 + "\n", "٣" * 32, "0" * 10_000, ""]),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_MALFORMED)
async def test_malformed_id_never_reaches_the_store(storage, job_id):
    # Nobody listens here: whatever touches the store is a StorageUnavailable.
    nowhere = ObjectStore(storage.model_copy(update={"endpoint_url": "http://127.0.0.1:9"}))
    journal = JobJournal(nowhere)
    record = JobRecord(id=job_id, status="failed", request=_REQUEST)
    for call in (
        journal.accept(job_id, _REQUEST),
        journal.read(job_id),
        journal.publish(job_id, record),
        journal.request_cancel(job_id),
        journal.is_cancelled(job_id),
    ):
        with pytest.raises(JobNotFound) as caught:
            await call
        assert caught.value.status == 404
    with pytest.raises(JobNotFound):
        JobJournal.image_key(job_id, 0, "0" * 64, "png")


@pytest.mark.parametrize(
    ("index", "sha256", "ext"),
    [(-1, "0" * 64, "png"), (0, "0" * 63, "png"), (0, "A" * 64, "png"), (0, "0" * 64, "../x")],
)
def test_malformed_image_key(index, sha256, ext):
    with pytest.raises(ValueError, match="not a"):
        JobJournal.image_key(new_job_id(), index, sha256, ext)


async def test_only_the_end_of_this_job_is_published(journal, store):
    job_id = new_job_id()
    for record in (
        JobRecord(id=job_id, status="pending", request=_REQUEST),
        _succeeded(store, new_job_id()),
    ):
        with pytest.raises(ValueError, match="not the end"):
            await journal.publish(job_id, record)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b'{"id": "x"}', b'{"id":"x","status":"failed","request":{}}'],
)
async def test_record_that_somebody_else_wrote(journal, store, data):
    job_id = new_job_id()
    await store.put(f"jobs/{job_id}/result.json", data, "application/json")
    with pytest.raises(RecordUnreadable, match="cannot be read"):
        await journal.read(job_id)


async def test_a_record_of_another_job_decides_nothing(journal, store):
    mine, others = new_job_id(), new_job_id()
    await journal.accept(others, _REQUEST)
    copied = await store.get(f"jobs/{others}/request.json")
    no_request = JobRecord(id=mine, status="pending").model_dump_json().encode()
    no_end = JobRecord(id=mine, status="pending", request=_REQUEST).model_dump_json().encode()
    for name, data in (("request", copied), ("request", no_request), ("result", no_end)):
        await store.put(f"jobs/{mine}/{name}.json", data, "application/json")
        for call in (journal.read, journal.request_cancel):
            with pytest.raises(RecordUnreadable):
                await call(mine)
    assert (await journal.read(others)).status == "pending"


async def test_store_down_means_not_accepted(storage):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    down = storage.model_copy(
        update={"endpoint_url": f"http://127.0.0.1:{port}", "max_attempts": 1}
    )
    journal = JobJournal(ObjectStore(down))
    for call in (journal.accept(new_job_id(), _REQUEST), journal.read(new_job_id())):
        with pytest.raises(StorageUnavailable):
            await call


async def test_result_stands_if_its_pending_key_cannot_be_removed(journal, store, monkeypatch):
    job_id = new_job_id()
    await journal.accept(job_id, _REQUEST)

    async def refuse(key: str) -> None:
        raise StorageUnavailable("denied")

    monkeypatch.setattr(store, "delete", refuse)
    assert await journal.publish(job_id, _succeeded(store, job_id))
    assert (await journal.read(job_id)).status == "succeeded"
    assert await journal.pending() == [job_id]
