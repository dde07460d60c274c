"""The spool on a disk that is full, damaged or somebody else's, and pictures on their way out."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve import spool as spool_module
from serve.config import Settings, StorageSettings, load_settings
from serve.errors import StorageUnavailable
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.record_store import MemoryStore
from serve.spool import MadePicture, Spool, spool_of
from serve.storage import ObjectStore
from serve.uploads import Uploads
from tests.inprocess.made_pictures import made
from tests.inprocess.polling import until


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
    # Of two Pipelines.
    spool, other = (Spool(tmp_path / "a" / "b", 1 << 20) for _ in range(2))
    data = os.urandom(300 << 10)

    async def write(spool: Spool) -> bool:
        job_id = new_job_id()
        return await asyncio.to_thread(spool.write, job_id, made(data), data) is not None

    written = await asyncio.gather(*(write(each) for _ in range(8) for each in (spool, other)))
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
