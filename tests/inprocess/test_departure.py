"""A Pipeline is asked to go: what it can it finishes, and the rest another one does at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from serve import departure as departure_module
from serve import job_runner as job_runner_module
from serve.adoption import Adoption
from serve.config import StorageSettings
from serve.departure import Departure
from serve.errors import StageUnavailable, StorageUnavailable
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.journal_settings import JournalSettings
from serve.lease_store import LeaseStore
from serve.pipeline import Pipeline
from serve.requests import GenerateRequest
from serve.room_halves import RoomHalves
from serve.storage import ObjectStore
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline

KEYED = REQUEST.model_copy(update={"idempotency_key": "a"})


class Serve:
    """What a Pipeline sees of it: whether it is asked to go, and all of its application is."""

    def __init__(self) -> None:
        self.asks = False
        self.deletes = False

    def stop_signal(self) -> Callable[[], bool]:
        return lambda: self.asks


@pytest.fixture
def serve() -> Serve:
    return Serve()


@pytest.fixture
def make(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> Callable[[StandIn], Pipeline]:
    monkeypatch.setattr(departure_module, "_IS_TOLD_WITHIN_S", 0.1)

    def make(stages: StandIn) -> Pipeline:
        # So long that nobody in these tests can have waited for its end.
        settings = JournalSettings(lease_s=600.0)
        with monkeypatch.context() as patch:
            patch.setattr(job_runner_module, "stop_signal", serve.stop_signal)
            pipeline = new_pipeline(stages, storage, monkeypatch, journal=settings)
        monkeypatch.setattr(job_runner_module, "is_deleted", lambda application: serve.deletes)
        return pipeline

    return make


async def in_time(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():
            await asyncio.sleep(0.02)


async def taken_over(
    make: Callable[[StandIn], Pipeline], serve: Serve, journal: JobJournal, job_id: str
) -> None:
    """See another Pipeline finish it, at once."""
    serve.asks = False
    await make(StandIn()).check_health()
    async with asyncio.timeout(20):
        while not (record := await journal.read(job_id)) or not record.is_over:
            await asyncio.sleep(0.05)
    assert record.status == "succeeded"


async def test_what_fails_because_everything_stops_stays_pending(
    make: Callable[[StandIn], Pipeline],
    serve: Serve,
    journal: JobJournal,
    storage: StorageSettings,
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make(stages)
    await pipeline.check_health()
    job_id = (await pipeline.submit(REQUEST)).id
    following = asyncio.create_task(follow(pipeline, job_id))
    waiting = asyncio.create_task(pipeline.generate(REQUEST))
    waiting_by_key = asyncio.create_task(pipeline.generate(KEYED))
    await in_time(lambda: len(stages.denoised) == 3)
    stages.error = StageUnavailable("gone")
    serve.asks = True
    stages.gate.set()
    for call in (waiting, waiting_by_key):
        with pytest.raises(StageUnavailable):
            await call
    # Its stream ends, and says of no end.
    assert not any(event.is_last for event in await following)
    await pipeline.depart()
    assert await LeaseStore(ObjectStore(storage)).etags() == {}
    # But for what nobody can ask for any more.
    left = await journal.pending()
    assert len(left) == 2
    assert job_id in left
    with pytest.raises(StorageUnavailable):
        await pipeline.submit(REQUEST)
    for each in left:
        await taken_over(make, serve, journal, each)


async def test_all_is_let_go_when_the_application_is_deleted(
    make: Callable[[StandIn], Pipeline], serve: Serve, journal: JobJournal
):
    stages = StandIn()
    stages.gate.clear()  # as if it waited for a replica, of which none comes any more
    pipeline = make(stages)
    await pipeline.check_health()
    job_id = (await pipeline.submit(REQUEST)).id
    following = asyncio.create_task(follow(pipeline, job_id))
    waiting = asyncio.create_task(pipeline.generate(REQUEST))
    await in_time(lambda: len(stages.denoised) == 2)
    serve.asks = serve.deletes = True
    with pytest.raises(StageUnavailable):
        await asyncio.wait_for(waiting, 20)
    assert not any(event.is_last for event in await asyncio.wait_for(following, 20))
    await asyncio.wait_for(pipeline.depart(), 20)
    assert await journal.pending() == [job_id]
    serve.deletes = False
    await taken_over(make, serve, journal, job_id)


async def test_a_stage_that_is_down_while_nothing_stops_is_a_failure(
    make: Callable[[StandIn], Pipeline], journal: JobJournal
):
    stages = StandIn()
    stages.error = StageUnavailable("gone")
    pipeline = make(stages)
    job_id = (await pipeline.submit(REQUEST)).id
    assert (await follow(pipeline, job_id))[-1].event == "failed"
    record = await journal.read(job_id)
    assert record is not None
    assert record.status == "failed"


async def test_what_can_be_finished_is(
    make: Callable[[StandIn], Pipeline], serve: Serve, journal: JobJournal
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make(stages)
    job_id = (await pipeline.submit(REQUEST)).id
    await stages.at_gate.wait()
    serve.asks = True
    await journal.accept(orphan := new_job_id(), REQUEST, "gone-1")
    await pipeline.check_health()
    going = asyncio.create_task(pipeline.depart())
    await pipeline._jobs.keeping._takeover.look()
    assert orphan not in pipeline._live, "who goes takes nothing over"
    stages.gate.set()
    await asyncio.wait_for(going, 20)
    record = await journal.read(job_id)
    assert record is not None
    assert record.status == "succeeded"


async def test_what_lasts_longer_than_serve_waits_is_let_go(
    make: Callable[[StandIn], Pipeline],
    serve: Serve,
    journal: JobJournal,
    monkeypatch: pytest.MonkeyPatch,
):
    stages = StandIn()
    stages.gate.clear()
    pipeline = make(stages)
    job_id = (await pipeline.submit(REQUEST)).id
    await stages.at_gate.wait()
    serve.asks = True
    monkeypatch.setattr(departure_module, "_MARGIN_S", pipeline._jobs._departure._within_s - 0.2)
    await asyncio.wait_for(pipeline.depart(), 20)
    # The process, which Serve is about to kill, publishes nothing any more.
    stages.gate.set()
    await in_time(lambda: pipeline._live[job_id].newest.event == "decode")  # type: ignore[union-attr]
    await taken_over(make, serve, journal, job_id)


async def test_who_goes_takes_nothing_over(serve: Serve):
    async def admit(request: GenerateRequest) -> GenerateRequest:
        return request

    departure = Departure(serve.stop_signal(), lambda: False, within_s=60.0)
    adoption = Adoption({}, admit, RoomHalves(), lambda job: None, 4, departure)
    assert adoption.may_take
    serve.asks = True
    assert not adoption.may_take
