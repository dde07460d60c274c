"""A Pipeline is thought dead: it gives up what others took, and each job ends once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve.errors import StorageUnavailable
from serve.jobs import JobJournal
from serve.lease_store import Lease, LeaseStore
from serve.pipeline import Pipeline
from serve.requests import JobRecord
from serve.storage import ObjectStore
from tests.inprocess.ended_pipelines import LEASE_S, ended
from tests.inprocess.polling import until
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow


async def renew(leases: LeaseStore, lease: Lease) -> None:
    """Be a living Pipeline, as far as others see."""
    while True:
        lease = await leases.renew(lease, {}) or lease
        await asyncio.sleep(LEASE_S / 10)


async def test_who_lost_the_lease_gives_up_what_others_took_and_keeps_the_rest(
    make_leased: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    slow = StandIn()
    slow.gate.clear()
    pipeline = make_leased(slow)
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
    make_leased: Callable[..., Pipeline], journal: JobJournal, store: ObjectStore
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make_leased(stages)
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
    make_leased: Callable[..., Pipeline], store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    pipeline = make_leased(StandIn())
    custody, leases = pipeline._jobs.keeping.custody, LeaseStore(store)
    name = await custody.holding()
    assert await leases.end(name, (await leases.etags())[name])
    monkeypatch.setattr(type(custody), "is_held", property(lambda self: self.name != name))
    # It finds out while it writes the job down.
    result = await asyncio.wait_for(pipeline.generate(REQUEST), 20)
    assert result.images
    assert custody.name != name


async def test_without_a_lease_nothing_is_accepted_or_published(
    make_leased: Callable[..., Pipeline], journal: JobJournal, monkeypatch: pytest.MonkeyPatch
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make_leased(stages)
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
