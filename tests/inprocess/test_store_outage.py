"""Store trouble: finished pictures wait on disk; none is lost, none told of before it is stored."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve import uploads as uploads_module
from serve.config import StorageSettings
from serve.errors import StorageUnavailable
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.lease_store import LeaseStore
from serve.pipeline import Pipeline
from serve.spool_settings import SpoolSettings
from serve.storage import ObjectStore
from tests.inprocess.faulty_server import passing_on, serving
from tests.inprocess.made_pictures import made
from tests.inprocess.polling import until
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline

IMPATIENT = {"max_attempts": 1, "connect_timeout_s": 1.0, "read_timeout_s": 2.0}

LEASE_S = 3.0


def xml(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code></Error>".encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


TROUBLE = {
    "reset": b"",
    "full": xml(507, "XMinioStorageFull"),
    "quota": xml(403, "QuotaExceeded"),
    "expired": xml(403, "ExpiredToken"),
    "busy": xml(503, "SlowDown"),
    "broken": xml(500, "InternalError"),
}


class Outage:
    """A store that can be taken away; its settings."""

    def __init__(self, storage: StorageSettings) -> None:
        self.direct = storage
        self.storage = storage
        self.is_open = threading.Event()
        self.is_open.set()


@pytest.fixture
def outage(storage: StorageSettings, request: pytest.FixtureRequest) -> Iterator[Outage]:
    made = Outage(storage)
    instead = TROUBLE[getattr(request, "param", "reset")]
    with serving(passing_on(str(storage.endpoint_url), made.is_open, instead)) as url:
        made.storage = storage.model_copy(update={"endpoint_url": url, **IMPATIENT})
        yield made


@pytest.fixture
def make(
    outage: Outage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Pipeline]:
    def make(stages: StandIn, **sections: Any) -> Pipeline:
        given = {
            "journal": JournalSettings(lease_s=LEASE_S),
            "spool": SpoolSettings(directory=str(tmp_path / "spool"), mib=1),
            **sections,
        }
        return new_pipeline(stages, outage.storage, monkeypatch, **given)

    return make


async def waiting(pipeline: Pipeline) -> int:
    return int((await pipeline._uploads.as_json())["waiting_pictures"])


def stop(pipeline: Pipeline) -> None:
    """Let a Pipeline do no more, as if its process were gone."""
    drain = pipeline._uploads._drain
    for task in (*pipeline._jobs.keeping._tasks, *([drain] if drain else [])):
        task.cancel()
    for job in pipeline._live.values():
        assert job._life is not None
        job._life.cancel()


def spooled(tmp_path: Path) -> list[str]:
    return sorted(file.suffix for file in tmp_path.rglob("*.*") if file.is_file())


@pytest.mark.parametrize("outage", TROUBLE, indirect=True)
async def test_pictures_wait_for_the_store_and_nothing_is_lost(
    make: Callable[..., Pipeline], outage: Outage, tmp_path: Path
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make(stages)
    jobs = [await pipeline.submit(REQUEST) for _ in range(2)]
    await stages.at_gate.wait()
    outage.is_open.clear()
    stages.gate.set()

    async def all_wait() -> bool:
        return await waiting(pipeline) == 2

    await until(all_wait)
    assert spooled(tmp_path) == [".json"] * 2 + [".picture"] * 2
    for job in jobs:
        record = await pipeline.job(job.id)
        assert (record.status, record.result) == ("running", None)
    with pytest.raises(StorageUnavailable):
        await pipeline.submit(REQUEST)
    outage.is_open.set()
    for job in jobs:
        last = (await follow(pipeline, job.id))[-1]
        assert last.event == "stored", last
        assert last.result is not None
        for image in last.result.images:
            assert httpx.get(image.url, trust_env=False).status_code == 200
    assert len(stages.denoised) == 2
    assert spooled(tmp_path) == []
    assert await JobJournal(ObjectStore(outage.direct)).pending() == []
    assert (await pipeline.generate(REQUEST)).images, "and it goes on"


async def test_the_spool_survives_its_pipeline(
    make: Callable[..., Pipeline], outage: Outage, tmp_path: Path
):
    stages = StandIn()
    stages.gate.clear()
    dead = make(stages)
    job_id = (await dead.submit(REQUEST.model_copy(update={"num_images": 2}))).id
    await stages.at_gate.wait()
    outage.is_open.clear()
    stages.gate.set()

    async def both_wait() -> bool:
        return await waiting(dead) == 2

    await until(both_wait)
    stop(dead)
    # One of the two is damaged, as by a disk that was full.
    damaged = min(tmp_path.rglob("*.picture"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    living = StandIn()
    pipeline = make(living)
    await pipeline.check_health()
    outage.is_open.set()
    journal = JobJournal(ObjectStore(outage.direct))

    async def ended() -> bool:
        return await journal.has_ended(job_id)

    await until(ended)
    record = await journal.read(job_id)
    assert record is not None
    assert record.result is not None
    assert [image.index for image in record.result.images] == [0, 1]
    assert [job.image for job in living.denoised] == [int(damaged.name[0])], "only the damaged one"
    assert {report.stage for report in record.result.stages} == {
        "text",
        "denoise",
        "decode",
        "store",
    }
    for image in record.result.images:
        assert httpx.get(image.url, trust_env=False).status_code == 200
    assert spooled(tmp_path) == []


async def test_acceptance_stops_before_the_spool_is_full(
    make: Callable[..., Pipeline], outage: Outage
):
    stages = StandIn()
    own_journal = JournalSettings(lease_s=LEASE_S, storage=outage.direct)
    pipeline = make(stages, journal=own_journal)
    # Room for one picture at most: 16 x 16 bare pixels and its metadata.
    assert pipeline._uploads._spool is not None
    pipeline._uploads._spool.most_bytes = 90_000
    outage.is_open.clear()
    first = await pipeline.submit(REQUEST)

    async def waits() -> bool:
        return await waiting(pipeline) == 1

    await until(waits)
    with pytest.raises(StorageUnavailable) as caught:
        await pipeline.submit(REQUEST)
    assert (caught.value.status, caught.value.field) == (503, "spool.mib")
    outage.is_open.set()
    assert (await follow(pipeline, first.id))[-1].event == "stored"
    assert (await pipeline.generate(REQUEST)).images


async def test_without_a_spool_what_is_made_waits_in_memory(
    make: Callable[..., Pipeline], outage: Outage, tmp_path: Path
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make(stages, spool=SpoolSettings(mib=0))
    first = await pipeline.submit(REQUEST)
    await stages.at_gate.wait()
    second = await pipeline.submit(REQUEST.model_copy(update={"num_images": 2}))
    stages.at_gate.clear()
    outage.is_open.clear()
    stages.gate.set()

    async def some_wait() -> bool:
        return await waiting(pipeline) > 0

    await until(some_wait)
    assert spooled(tmp_path) == []
    outage.is_open.set()
    for job in (first, second):
        assert (await follow(pipeline, job.id))[-1].event == "stored"


async def test_what_has_not_begun_is_not_made_while_there_is_no_room_for_it(
    make: Callable[..., Pipeline], outage: Outage, monkeypatch: pytest.MonkeyPatch
):
    stages, may_encode = StandIn(), asyncio.Event()
    pipeline = make(stages, spool=SpoolSettings(mib=0))
    stages.gate.clear()
    first = await pipeline.submit(REQUEST)
    await stages.at_gate.wait()
    encode = stages._encode

    async def encode_late(jobs: Any) -> Any:
        await may_encode.wait()
        return await encode(jobs)

    monkeypatch.setattr(stages, "_encode", encode_late)
    second = await pipeline.submit(REQUEST)
    outage.is_open.clear()
    stages.gate.set()

    async def waits() -> bool:
        return await waiting(pipeline) == 1

    await until(waits)
    may_encode.set()
    async for event in pipeline.events(second.id):
        if event.event == "text":
            break
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(stages.denoised) == 1
    outage.is_open.set()
    for job in (first, second):
        assert (await follow(pipeline, job.id))[-1].event == "stored"
    assert len(stages.denoised) == 2


async def test_what_waits_for_jobs_that_have_ended_is_removed(
    make: Callable[..., Pipeline],
    outage: Outage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(uploads_module, "_BETWEEN_TIDYING_S", 0.05)
    journal = JobJournal(ObjectStore(outage.direct))
    alive, unknown = new_job_id(), new_job_id()
    stages = StandIn()
    pipeline = make(stages)
    await LeaseStore(ObjectStore(outage.direct)).take("another", 1, {})
    await journal.accept(alive, REQUEST, "another-1")
    await pipeline.check_health()
    spool = pipeline._uploads._spool
    assert spool is not None
    for job_id in (alive, unknown):
        assert spool.write(job_id, made(b"PNG"), b"PNG") is not None
    assert sorted(spool.jobs()) == sorted([alive, unknown])

    async def tidied() -> bool:
        return spool.jobs() == [alive]

    await until(tidied)
