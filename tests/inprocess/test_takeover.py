"""A Pipeline dies: its jobs go on elsewhere and each ends once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve import takeover as takeover_module
from serve.errors import StorageUnavailable
from serve.job_ids import new_job_id, shard
from serve.jobs import JobJournal
from serve.lease_store import LeaseStore
from serve.pipeline import Pipeline
from serve.relapses import Relapses
from serve.requests import JobRecord
from serve.storage import ObjectStore
from tests.inprocess.ended_pipelines import LEASE_S, ended, stop
from tests.inprocess.polling import until
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow


async def test_jobs_of_a_dead_pipeline_finish_in_a_living_one(
    make_leased: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    hung = StandIn()
    hung.gate.clear()
    dead = make_leased(hung)
    ids = [(await dead.submit(REQUEST.model_copy(update={"seed": n}))).id for n in range(2)]
    await hung.at_gate.wait()
    stop(dead)
    living = StandIn()
    await make_leased(living, recovered_at_once=1).check_health()
    for number, job_id in enumerate(ids):
        record = await ended(journal, job_id)
        assert record.status == "succeeded"
        assert record.result is not None
        assert record.result.images[0].seed == number
        assert await store.list_keys(f"jobs/{job_id}/attempts/") == [
            f"jobs/{job_id}/attempts/000002.json"
        ]
    assert [job.job_id for job in living.denoised] == sorted(ids), "oldest first, once each"
    assert await journal.pending() == []
    assert len(await LeaseStore(store).etags()) == 1


async def test_two_takers_do_each_job_once(
    make_leased: Callable[..., Pipeline], journal: JobJournal
):
    ids = [new_job_id() for _ in range(6)]
    for job_id in ids:
        await journal.accept(job_id, REQUEST, "gone-1")
    takers = StandIn(), StandIn()
    for stages in takers:
        await make_leased(stages).check_health()
    for job_id in ids:
        assert (await ended(journal, job_id)).status == "succeeded"
    assert sorted(job.job_id for stages in takers for job in stages.denoised) == sorted(ids)


async def test_a_living_pipelines_jobs_are_its_own(
    make_leased: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    busy = StandIn()
    busy.gate.clear()
    owner = make_leased(busy)
    # All that it has room for, so that the orphan is the other's.
    job_id = (await owner.submit(REQUEST.model_copy(update={"num_images": 3}))).id
    idle = StandIn()
    other = make_leased(idle)
    # Before the other one begins, or its next listing would be waited for.
    await journal.accept(orphan := new_job_id(), REQUEST, "gone-1")
    await other.check_health()
    assert (await ended(journal, orphan)).status == "succeeded"
    # Longer than a lease nobody touches what has an owner.
    until_s = asyncio.get_running_loop().time() + 1.5 * LEASE_S
    while asyncio.get_running_loop().time() < until_s:
        other._jobs.keeping._takeover.list_soon()
        await other._jobs.keeping._takeover.look()
        await asyncio.sleep(0.1)
    assert [job.job_id for job in idle.denoised] == [orphan]
    busy.gate.set()
    assert (await ended(journal, job_id)).status == "succeeded"


async def test_what_cannot_be_done_is_parked_with_its_error(
    make_leased: Callable[..., Pipeline],
    journal: JobJournal,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(takeover_module, "_WAITS_FOR_MODEL_S", 0.2)
    unreadable, foreign, cancelled, never_written = (new_job_id() for _ in range(4))
    await journal.accept(unreadable, REQUEST, "gone-1")
    await store.put(f"jobs/{unreadable}/request.json", b'{"id": 5}', "application/json")
    await journal.accept(foreign, REQUEST.model_copy(update={"model": "another"}), "gone-1")
    await journal.accept(cancelled, REQUEST, "gone-1")
    await store.put(f"jobs/{cancelled}/cancel.json", b"{}", "application/json")
    await store.put(f"pending/{shard(never_written)}/{never_written}", b"\xff", "text/plain")
    await store.put("pending/00/not-a-job", b"", "text/plain")
    pipeline = make_leased(StandIn())
    await pipeline.check_health()
    for job_id, code in ((unreadable, "record_unreadable"), (foreign, "model_not_found")):
        record = await ended(journal, job_id)
        assert record.status == "failed"
        assert record.error is not None
        assert record.error["error"]["code"] == code
        assert (await follow(pipeline, job_id))[-1].error == record.error
    assert (await ended(journal, cancelled)).status == "cancelled"

    async def none_left() -> bool:
        return await journal.pending() == []

    await until(none_left)


async def test_a_job_whose_acceptance_was_not_answered_is_made_once_it_is_asked_for_again(
    make_leased: Callable[..., Pipeline], journal: JobJournal, monkeypatch: pytest.MonkeyPatch
):
    pipeline = make_leased(StandIn())
    await pipeline.check_health()
    # No listing comes by itself before the test is over.
    monkeypatch.setattr(takeover_module, "_LEASES_BETWEEN_LISTINGS", 10**6)
    pipeline._jobs.keeping._takeover.list_soon()
    await pipeline._jobs.keeping._takeover.look()
    accept = pipeline._journal.accept

    async def not_answered(*arguments: Any) -> bool:
        await accept(*arguments)
        raise StorageUnavailable("The answer was lost.")

    keyed = REQUEST.model_copy(update={"idempotency_key": "once"})
    with monkeypatch.context() as lost:
        lost.setattr(pipeline._journal, "accept", not_answered)
        with pytest.raises(StorageUnavailable):
            await pipeline.submit(keyed)
    job = await pipeline.submit(keyed)
    assert (await ended(journal, job.id)).status == "succeeded"


async def test_what_killed_pipeline_after_pipeline_goes_on_slowly_and_one_at_a_time(
    make_leased: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    worn = sorted(new_job_id() for _ in range(2))
    for job_id in worn:
        await journal.accept(job_id, REQUEST, "gone-1")
        for attempt in range(2, 5):
            key = f"jobs/{job_id}/attempts/{attempt:06d}.json"
            await store.put(key, b'{"pipeline": "gone-1"}', "application/json")
        # Nobody's claim, whatever it is.
        await store.put(f"jobs/{job_id}/attempts/\u00b2.json", b"[" * 9999, "application/json")
    await journal.accept(new := new_job_id(), REQUEST, "gone-1")
    stages = StandIn()
    pipeline = make_leased(stages, recovered_at_once=8)
    takeover = pipeline._jobs.keeping._takeover
    takeover._relapses = Relapses(0.5)

    async def look() -> None:
        await pipeline._jobs.keeping.custody.keep()
        await takeover.look()

    await look()
    assert (await ended(journal, new)).status == "succeeded"
    assert [job.job_id for job in stages.denoised] == [new], "who is new waits for neither"
    stages.gate.clear()

    async def one_is_taken() -> bool:
        await look()
        return bool(pipeline._live)

    await until(one_is_taken)
    first = list(pipeline._live)
    for _ in range(3):
        await look()
    assert list(pipeline._live) == first
    stages.gate.set()

    async def both_have_ended() -> bool:
        await look()
        return await journal.pending() == []

    await until(both_have_ended)
    for job_id in worn:
        assert (await ended(journal, job_id)).status == "succeeded"
        assert (await pipeline._jobs.keeping._claims.newest(job_id)).attempt == 5


async def test_an_orphan_that_fails_in_a_way_nobody_foresaw_holds_up_no_others(
    make_leased: Callable[..., Pipeline], journal: JobJournal, monkeypatch: pytest.MonkeyPatch
):
    odd, *others = sorted(new_job_id() for _ in range(3))
    for job_id in (odd, *others):
        await journal.accept(job_id, REQUEST, "gone-1")
    pipeline = make_leased(StandIn())
    read = pipeline._journal.read

    async def fail_for_one(job_id: str) -> JobRecord | None:
        if job_id == odd:
            raise RuntimeError("unforeseen")
        return await read(job_id)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._journal, "read", fail_for_one)
        await pipeline.check_health()
        for job_id in others:
            assert (await ended(journal, job_id)).status == "succeeded"
        assert await journal.pending() == [odd], "nor is it parked"
    assert (await ended(journal, odd)).status == "succeeded"


async def test_a_deadline_counts_from_the_first_acceptance(
    make_leased: Callable[..., Pipeline], journal: JobJournal
):
    hour_ago = f"{int(new_job_id()[:12], 16) - 3_600_000:012x}" + new_job_id()[12:]
    await journal.accept(hour_ago, REQUEST.model_copy(update={"deadline_s": 60.0}), "gone-1")
    await make_leased(StandIn()).check_health()
    record = await ended(journal, hour_ago)
    assert record.error is not None
    assert record.error["error"]["code"] == "deadline_exceeded"
