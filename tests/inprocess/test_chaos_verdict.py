"""The judge of chaos sees each way in which a job can be lost, doubled or changed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from loadtest import chaos_attack
from loadtest.chaos_attack import Attack
from loadtest.chaos_load import VARIANTS, Load
from loadtest.chaos_verdict import Books
from serve.config import StorageSettings
from serve.job_ids import new_job_id
from serve.jobs import JobJournal
from serve.storage import ObjectStore
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline

BLACK = [np.zeros((16, 16, 3), np.uint8)] * VARIANTS
WHITE = [np.full((16, 16, 3), 255, np.uint8)] * VARIANTS


@pytest.fixture
def told(storage: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job that was really done, as a client was told of it."""

    async def done() -> dict[str, Any]:
        pipeline = new_pipeline(StandIn(), storage, monkeypatch)
        job_id = (await pipeline.submit(REQUEST)).id
        await follow(pipeline, job_id)
        return (await pipeline.job(job_id)).model_dump(mode="json")

    return asyncio.run(done())


def load_with(told: dict[str, Any], number: int = 1) -> Load:
    load = Load("http://127.0.0.1:9", number, 1)
    load.accepted[told["id"]] = 0
    load.ended[told["id"]] = told
    return load


def test_nothing_is_wrong_with_what_went_well(told: dict[str, Any], storage: StorageSettings):
    found = Books(storage).verdict(load_with(told), set(), BLACK)
    assert found["ok"], found
    assert found["succeeded"] == 1


def test_whatever_is_wrong_is_seen(told: dict[str, Any], storage: StorageSettings):
    books, store = Books(storage), ObjectStore(storage)
    job_id = told["id"]

    def wrong(load: Load, pictures: Any = BLACK, before: Any = ()) -> set[str]:
        found = books.verdict(load, before, pictures)
        assert not found["ok"]
        return {name for name, value in found.items() if isinstance(value, list) and value}

    assert wrong(load_with(told), WHITE) == {"different_pictures"}
    failed = told | {"status": "failed", "error": {}, "result": None}
    assert wrong(load_with(failed)) == {"failed"}
    image = told["result"]["images"][0] | {"sha256": "0" * 64}
    lying = told | {"result": told["result"] | {"images": [image]}}
    assert wrong(load_with(lying)) == {"told_otherwise_than_on_record"}
    unknown = load_with(told)
    del unknown.accepted[job_id], unknown.ended[job_id]
    assert wrong(unknown) == {"accepted_twice"}
    # Nothing is on any list, but a job was never accepted.
    assert wrong(load_with(told, number=2)) == set()
    (key,) = asyncio.run(store.list_keys(f"images/{job_id}/"))
    asyncio.run(store.delete(key))
    assert wrong(load_with(told)) == {"missing_pictures"}


def test_clients_of_a_service_that_is_down_try_on_and_are_counted():
    with Load("http://127.0.0.1:9", 2, 2) as load:
        deadline = time.monotonic() + 20
        while load.unheard < 2 or len(load.samples) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert load.failure is None
    assert load.accepted == {}
    assert load.longest_silence_s == 0


def test_of_a_job_that_does_not_end_it_tells_what_is_on_record(
    told: dict[str, Any], storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chaos_attack, "_STALLED_S", 0.3)
    store = ObjectStore(storage)
    stuck, lost = new_job_id(), new_job_id()
    for job_id in (stuck, lost):
        asyncio.run(JobJournal(store).accept(job_id, REQUEST, "gone-1"))
    asyncio.run(JobJournal(store).forget_pending(lost))
    load = load_with(told, number=3)
    load.accepted |= {stuck: 0, lost: 0}
    said: list[str] = []

    class Untouched:
        def recovered(self) -> None:
            pass

    attack = Attack(Untouched(), load, 0, said.append)  # type: ignore[arg-type]
    assert "no job has ended for" in str(attack.run(1, (), 60.0))
    found = Books(storage).verdict(load, set(), BLACK)
    assert not found["ok"]
    by_id = {each["id"]: each for each in found["not_ended"]}
    assert by_id.keys() == {stuck, lost}
    assert by_id[stuck]["is_pending"]
    assert by_id[stuck]["claimed_by"] == "gone-1"
    assert not by_id[stuck]["claimant_has_a_lease"]
    assert not by_id[lost]["is_pending"]
    assert by_id[lost]["on_record"] == "pending"
