"""A Pipeline dies, or is thought dead: its jobs go on elsewhere and each ends once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve import endings as endings_module
from serve import takeover as takeover_module
from serve.config import StorageSettings
from serve.errors import Overloaded, RecordUnreadable, StorageUnavailable
from serve.job_ids import new_job_id, shard
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.lease_store import Lease, LeaseStore
from serve.pipeline import Pipeline
from serve.relapses import Relapses
from serve.requests import JobRecord
from serve.running import RunningJob
from serve.served_models import ServedModel
from serve.storage import ObjectStore
from tests.inprocess.polling import until
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline

LEASE_S = 3.0


@pytest.fixture
def store(storage: StorageSettings) -> ObjectStore:
    return ObjectStore(storage)


@pytest.fixture
def journal(store: ObjectStore) -> JobJournal:
    return JobJournal(store)


@pytest.fixture
def make(storage: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pipeline]:
    monkeypatch.setattr(endings_module, "_ELSEWHERE_POLL_S", 0.05)

    def make(stages: StandIn, **journal: Any) -> Pipeline:
        settings = JournalSettings(**{"lease_s": LEASE_S, **journal})
        return new_pipeline(stages, storage, monkeypatch, journal=settings)

    return make


async def renew(leases: LeaseStore, lease: Lease) -> None:
    """Be a living Pipeline, as far as others see."""
    while True:
        lease = await leases.renew(lease, {}) or lease
        await asyncio.sleep(LEASE_S / 10)


def stop(pipeline: Pipeline) -> None:
    """Let a Pipeline do no more, as if its process were gone."""
    for task in pipeline._jobs.keeping._tasks:
        task.cancel()
    for job in pipeline._live.values():
        assert job._life is not None
        job._life.cancel()


async def ended(journal: JobJournal, job_id: str) -> JobRecord:
    async def over() -> JobRecord | None:
        try:
            record = await journal.read(job_id)
        except RecordUnreadable:
            return None
        return record if record is not None and record.is_over else None

    found: JobRecord = await until(over)
    return found


async def test_jobs_of_a_dead_pipeline_finish_in_a_living_one(
    make: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    hung = StandIn()
    hung.gate.clear()
    dead = make(hung)
    ids = [(await dead.submit(REQUEST.model_copy(update={"seed": n}))).id for n in range(2)]
    await hung.at_gate.wait()
    stop(dead)
    living = StandIn()
    await make(living, recovered_at_once=1).check_health()
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


async def test_two_takers_do_each_job_once(make: Callable[..., Pipeline], journal: JobJournal):
    ids = [new_job_id() for _ in range(6)]
    for job_id in ids:
        await journal.accept(job_id, REQUEST, "gone-1")
    takers = StandIn(), StandIn()
    for stages in takers:
        await make(stages).check_health()
    for job_id in ids:
        assert (await ended(journal, job_id)).status == "succeeded"
    assert sorted(job.job_id for stages in takers for job in stages.denoised) == sorted(ids)


async def test_a_living_pipelines_jobs_are_its_own(
    make: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    busy = StandIn()
    busy.gate.clear()
    owner = make(busy)
    # All that it has room for, so that the orphan is the other's.
    job_id = (await owner.submit(REQUEST.model_copy(update={"num_images": 3}))).id
    idle = StandIn()
    other = make(idle)
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


async def test_who_lost_the_lease_gives_up_what_others_took_and_keeps_the_rest(
    make: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    slow = StandIn()
    slow.gate.clear()
    pipeline = make(slow)
    taken, kept = [(await pipeline.submit(REQUEST)).id for _ in range(2)]
    following = asyncio.create_task(follow(pipeline, taken))
    await slow.at_gate.wait()
    custody = pipeline._jobs.keeping.custody
    leases = LeaseStore(store)
    name = await custody.holding()
    claims = pipeline._jobs.keeping._claims
    # Another Pipeline, which sees this one's lease unchanged, and begins with the first job. It
    # lives, or else that job would be taken back from it.
    other = await leases.take("other", 1, {})
    living = asyncio.create_task(renew(leases, other))
    async with custody._busy:
        assert await leases.end(name, (await leases.etags())[name])
        assert await claims.take(taken, await claims.newest(taken), other.name)
        assert not await leases.end(name, "gone"), "ended once"
    await until(lambda: custody.name != name and custody.is_held)
    # Before that it could still finish first, which would be no harm, and no test.
    await until(lambda: pipeline._live[taken].is_given_up)
    slow.gate.set()
    assert (await ended(journal, kept)).status == "succeeded"
    assert (await claims.newest(kept)).owner == custody.name
    assert not (await journal.read(taken)).is_over  # type: ignore[union-attr]
    record = JobRecord(id=taken, status="failed", request=REQUEST, error={"error": {}})
    assert await journal.publish(taken, record)
    assert (await following)[-1].event == "failed"
    living.cancel()


async def test_what_was_given_up_comes_back_when_its_taker_dies(
    make: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make(stages)
    waiting = asyncio.create_task(pipeline.generate(REQUEST))
    await stages.at_gate.wait()
    (job_id,) = await journal.pending()
    custody, claims, leases = (
        pipeline._jobs.keeping.custody,
        pipeline._jobs.keeping._claims,
        LeaseStore(store),
    )
    name = await custody.holding()
    async with custody._busy:
        assert await leases.end(name, (await leases.etags())[name])
        assert await claims.take(job_id, await claims.newest(job_id), "other-1")
        first = pipeline._live[job_id]
    await until(lambda: first.is_given_up)
    stages.gate.set()
    # "other-1" has no lease: it died at once.
    assert (await waiting).id == job_id
    assert (await claims.newest(job_id)).attempt == 3
    assert pipeline._live == {}


async def test_a_job_accepted_while_the_lease_is_lost_is_ones_own(
    make: Callable[..., Pipeline], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    pipeline = make(StandIn())
    custody, leases = pipeline._jobs.keeping.custody, LeaseStore(store)
    name = await custody.holding()
    assert await leases.end(name, (await leases.etags())[name])
    monkeypatch.setattr(type(custody), "is_held", property(lambda self: self.name != name))
    # It finds out while it writes the job down.
    result = await asyncio.wait_for(pipeline.generate(REQUEST), 20)
    assert result.images
    assert custody.name != name


async def test_without_a_lease_nothing_is_accepted_or_published(
    make: Callable[..., Pipeline], journal: JobJournal, monkeypatch: pytest.MonkeyPatch
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make(stages)
    job_id = (await pipeline.submit(REQUEST)).id
    await stages.at_gate.wait()

    async def refuse(*_: Any) -> None:
        raise StorageUnavailable("slow")

    with monkeypatch.context() as patch:
        patch.setattr(LeaseStore, "renew", refuse)
        await until(lambda: not pipeline._jobs.keeping.custody.is_held)
        stages.gate.set()
        with pytest.raises(StorageUnavailable):
            await pipeline.submit(REQUEST)
        await until(lambda: pipeline._live[job_id].newest.event == "decode")  # type: ignore[union-attr]
        record = await journal.read(job_id)
        assert record is not None
        assert record.status == "pending"
    assert (await ended(journal, job_id)).status == "succeeded"


async def test_what_cannot_be_done_is_parked_with_its_error(
    make: Callable[..., Pipeline],
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
    pipeline = make(StandIn())
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


async def test_orphans_leave_room_for_new_work(make: Callable[..., Pipeline], journal: JobJournal):
    ids = sorted(new_job_id() for _ in range(4))
    for job_id in ids:
        await journal.accept(job_id, REQUEST, "gone-1")
    stages = StandIn()
    stages.gate.clear()
    # It takes three pictures at a time: one orphan, and the rest of the room is for new requests.
    pipeline = make(stages)
    await pipeline.check_health()
    await stages.at_gate.wait()
    await pipeline._jobs.keeping._takeover.look()
    assert list(pipeline._live) == ids[:1]
    new = await pipeline.submit(REQUEST.model_copy(update={"num_images": 2}))
    stages.gate.set()
    for job_id in (new.id, *ids):
        assert (await ended(journal, job_id)).status == "succeeded"


async def test_a_job_whose_acceptance_was_not_answered_is_made_once_it_is_asked_for_again(
    make: Callable[..., Pipeline], journal: JobJournal, monkeypatch: pytest.MonkeyPatch
):
    pipeline = make(StandIn())
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


async def test_new_requests_without_end_do_not_keep_orphans_waiting(
    make: Callable[..., Pipeline], journal: JobJournal
):
    stages = StandIn()
    stages.gate.clear()
    # It takes three pictures at a time, and new requests have taken all places.
    pipeline = make(stages)
    await pipeline.check_health()
    keeping = pipeline._jobs.keeping
    # Only when told to: two looks at a time do not happen.
    looking = next(task for task in keeping._tasks if task.get_name() == "takeover")
    looking.cancel()
    await asyncio.wait({looking})
    new = [(await pipeline.submit(REQUEST)).id for _ in range(3)]
    await journal.accept(orphan := new_job_id(), REQUEST, "gone-1")
    keeping._takeover.list_soon()
    await keeping._takeover.look()
    assert sorted(pipeline._live) == sorted(new)
    # The next place is the orphan's, however often another request asks for it.
    await pipeline.cancel(new.pop(0))

    async def is_taken_over() -> bool:
        with pytest.raises(Overloaded):
            await pipeline.submit(REQUEST)
        await keeping._takeover.look()
        return orphan in pipeline._live

    await until(is_taken_over)
    # While none waits, new requests may have every place.
    await pipeline.cancel(new.pop(0))
    await until(lambda: len(pipeline._live) < 3)
    new.append((await pipeline.submit(REQUEST)).id)
    stages.gate.set()
    for job_id in (orphan, *new):
        assert (await ended(journal, job_id)).status == "succeeded"


async def test_an_orphan_that_waits_halves_the_room_of_models_that_share_its_pools_alone(
    make: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
):
    pipeline = make(StandIn())
    models, acceptance = pipeline._jobs._models, pipeline._jobs._acceptance
    pools = {
        stage: {f"{name}-apart": handle for name, handle in handles.items()}
        for stage, handles in models.own.stages.pools.items()
    }

    def named(name: str) -> ServedModel:
        spec = models.own.facts.spec.model_copy(update={"name": name})
        return replace(models.own, facts=replace(models.own.facts, spec=spec))

    apart = replace(named("apart"), stages=SimpleNamespace(pools=pools))  # type: ignore[arg-type]
    further = {"apart": apart, "beside": named("beside")}

    async def find(name: str) -> ServedModel:
        return further[name]

    monkeypatch.setattr(models, "_further", further)
    monkeypatch.setattr(models, "find", find)
    for name in further:
        # Two of the three that may be.
        made = REQUEST.model_copy(update={"model": name, "num_images": 2})
        pipeline._live[name] = RunningJob(new_job_id(), made)
    asked = {name: REQUEST.model_copy(update={"model": name}) for name in further}
    for request in asked.values():
        await acceptance.admit(request)
    acceptance._halves.waited_for.add(models.own.facts.spec.name)
    await acceptance.admit(asked["apart"])
    with pytest.raises(Overloaded):
        await acceptance.admit(asked["beside"])


async def test_what_killed_pipeline_after_pipeline_goes_on_slowly_and_one_at_a_time(
    make: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
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
    pipeline = make(stages, recovered_at_once=8)
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
    make: Callable[..., Pipeline], journal: JobJournal, monkeypatch: pytest.MonkeyPatch
):
    odd, *others = sorted(new_job_id() for _ in range(3))
    for job_id in (odd, *others):
        await journal.accept(job_id, REQUEST, "gone-1")
    pipeline = make(StandIn())
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
    make: Callable[..., Pipeline], journal: JobJournal
):
    hour_ago = f"{int(new_job_id()[:12], 16) - 3_600_000:012x}" + new_job_id()[12:]
    await journal.accept(hour_ago, REQUEST.model_copy(update={"deadline_s": 60.0}), "gone-1")
    await make(StandIn()).check_health()
    record = await ended(journal, hour_ago)
    assert record.error is not None
    assert record.error["error"]["code"] == "deadline_exceeded"
