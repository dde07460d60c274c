"""Store trouble: finished pictures wait on disk; none is lost, none told of before it is stored."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serve import spool as spool_module
from serve import uploads as uploads_module
from serve.config import Settings, StorageSettings, load_settings
from serve.errors import StorageUnavailable
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.lease_store import LeaseStore
from serve.pipeline import Pipeline
from serve.record_store import MemoryStore
from serve.requests import ImageRef
from serve.spool import MadePicture, Spool, spool_of
from serve.spool_settings import SpoolSettings
from serve.storage import ObjectStore
from serve.uploads import Uploads
from tests.inprocess.faulty_server import passing_on, serving
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


async def until(condition: Callable[[], Awaitable[Any]], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.02)


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
    return sorted(file.suffix for file in tmp_path.rglob("*") if file.is_file())


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


async def test_with_a_full_spool_what_is_made_waits_in_memory_and_the_rest_is_not_made(
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


def made(data: bytes, index: int = 0) -> MadePicture:
    import hashlib

    sha256 = hashlib.sha256(data).hexdigest()
    ref = ImageRef(
        index=index,
        s3_uri=f"s3://kelvin/images/{index}-{sha256}.png",
        url="",
        sha256=sha256,
        size_bytes=len(data),
        width=16,
        height=16,
        output_format="png",
        seed=0,
    )
    return MadePicture(ref=ref, reports=(), joules=None)


def test_a_spool_on_disk(tmp_path: Path):
    spool = Spool(tmp_path / "a" / "b", most_bytes=10_000)
    job_id = new_job_id()
    assert spool.find(job_id, 0) is None
    assert (spool.used_bytes(), spool.jobs()) == (0, [])
    data = np.random.default_rng(0).bytes(4_000)
    written = spool.write(job_id, made(data), data)
    assert written is not None
    assert spool.find(job_id, 0) == written
    assert written.read() == data
    assert spool.find(job_id, 1) is None
    assert 4_000 < spool.used_bytes() < 6_000
    assert spool.write(job_id, made(data, 1), data) is not None
    assert spool.write(job_id, made(data, 2), data) is None, "full"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0
    written.note.write_bytes(written.note.read_bytes()[:-9])
    assert spool.find(job_id, 0) is None, "half a note"
    damaged = spool.find(job_id, 1)
    assert damaged is not None
    damaged.file.write_bytes(data[:-1])
    assert spool.find(job_id, 1) is None
    assert not damaged.file.exists(), "or it would take up room that its successor does not need"
    written.remove()
    written.remove()
    spool.remove_job(job_id)
    assert spool.used_bytes() == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder somebody else's")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path):
    (tmp_path / "spool").mkdir()
    os.chown(tmp_path / "spool", 1234, 1234)
    spool = Spool(tmp_path / "spool" / "mine", most_bytes=10_000)
    assert spool.write(new_job_id(), made(b"PNG"), b"PNG") is None


def test_a_disk_that_refuses_is_no_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    spool = Spool(tmp_path / "file" / "spool", most_bytes=10_000)
    assert spool.write(new_job_id(), made(b"PNG"), b"PNG") is None
    assert spool.jobs() == []


async def test_pictures_finished_at_once_do_not_overfill_the_spool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_whole = spool_module._write_whole

    def slowly(file: Path, content: bytes) -> None:
        time.sleep(0.02)  # as a disk takes
        write_whole(file, content)

    monkeypatch.setattr(spool_module, "_write_whole", slowly)
    spool = Spool(tmp_path / "a" / "b", 1 << 20)
    data = os.urandom(300 << 10)

    async def write() -> bool:
        job_id = new_job_id()
        return await asyncio.to_thread(spool.write, job_id, made(data), data) is not None

    written = await asyncio.gather(*(write() for _ in range(16)))
    assert sum(written) == 3
    assert spool.used_bytes() <= spool.most_bytes


async def test_a_picture_that_the_store_refuses_holds_up_no_others(
    storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = ObjectStore(storage)
    uploads, job_id = Uploads(store, Spool(tmp_path / "a" / "b", 1 << 20)), new_job_id()
    put = store.put

    def stored_here(data: bytes, index: int) -> MadePicture:
        picture = made(data, index)
        uri = store.s3_uri(f"images/{job_id}/{index}-{picture.ref.sha256}.png")
        ref = picture.ref.model_copy(update={"s3_uri": uri})
        return picture.model_copy(update={"ref": ref})

    async def put_some(key: str, data: bytes, content_type: str, **conditions: Any) -> bool:
        if data == b"refused":
            raise StorageUnavailable("denied: of one tenant's folder, say")
        return await put(key, data, content_type, **conditions)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", put_some)
        first = asyncio.create_task(uploads.upload(job_id, stored_here(b"refused", 0), b"refused"))

        async def waits() -> bool:
            return uploads.is_in_trouble

        await until(waits)
        other = stored_here(b"other", 1)
        await asyncio.wait_for(uploads.upload(job_id, other, b"other"), 10)
        assert not first.done()
    await asyncio.wait_for(first, 10)
    assert len(await store.list_keys(f"images/{job_id}/")) == 2


async def test_a_folder_that_somebody_else_made_counts_for_nothing(tmp_path: Path):
    theirs, data, job_id = Spool(tmp_path / "theirs" / "x", 1 << 20), b"picture", new_job_id()
    assert theirs.write(job_id, made(data), data) is not None
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")
    ours = Spool(tmp_path / "ours" / "x", 1 << 20)
    assert theirs.find(job_id, 0) is not None
    assert ours.find(job_id, 0) is None
    assert ours.jobs() == []
    assert ours.used_bytes() == 0
    assert ours.write(job_id, made(data, 1), data) is None


def test_services_with_journals_of_their_own_do_not_tidy_each_others_pictures(tmp_path: Path):
    def settings(journal: dict[str, Any]) -> Settings:
        spool = {"directory": str(tmp_path)}
        return load_settings(overrides={"spool": spool, "journal": journal})

    spools = [spool_of(settings(each)) for each in ({}, {"storage": {"bucket": "other"}})]
    assert len({str(spool and spool.folder) for spool in spools}) == 2


async def test_without_a_journal_what_another_process_waits_with_is_left(
    storage: StorageSettings, tmp_path: Path
):
    spool = Spool(tmp_path / "a" / "b", 1 << 20)
    jobs = [new_job_id() for _ in range(2)]
    for job_id in jobs:
        assert spool.write(job_id, made(b"x"), b"x") is not None
    long_ago = time.time() - 7200
    os.utime(spool.folder / jobs[0], (long_ago, long_ago))
    uploads = Uploads(ObjectStore(storage), spool)
    tidying = asyncio.create_task(uploads.tidy(JobJournal(MemoryStore()), ()))

    async def is_tidied() -> bool:
        return spool.jobs() == [jobs[1]]

    await until(is_tidied)
    tidying.cancel()
