"""ComfyUI's prompts in a store: attached to jobs, and found again in order."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from serve.errors import RecordUnreadable
from serve.http import comfyui_prompts
from serve.http.comfyui_history import history_entry
from serve.http.comfyui_prompts import PromptRecords, chain_key
from serve.http.comfyui_record import ChainRecord, OtherChain, PromptRecord, drawn_id
from serve.idempotency import Idempotency
from serve.job_ids import first_job_id, new_job_id
from serve.jobs import JobJournal
from serve.record_store import MemoryStore
from serve.requests import GenerateRequest

_TENANT = "t"
_MILLISECONDS = itertools.count(1)
_REQUEST = GenerateRequest(prompt="a circle", seed=1)


def _record(
    prompt_id: str = "", created_ms: int = 0, jobs: tuple[str, ...] = ("",)
) -> PromptRecord:
    return PromptRecord(
        id=prompt_id,
        tenant=_TENANT,
        number=0,
        created_ms=created_ms,
        digest="",
        prompt={},
        extra_data={},
        chains=tuple(
            ChainRecord(job=job, sampler="5", encoder="2", decoder="6", outputs={}) for job in jobs
        ),
        node_errors={},
        warnings=(),
    )


async def _accepted(
    store: MemoryStore, record: PromptRecord, job_id: str | None = None
) -> PromptRecord:
    """Write a prompt down as the door does, and return it as it is to be found."""
    # Of jobs accepted within a millisecond none is the later one.
    job_id = job_id or f"{next(_MILLISECONDS):012x}{new_job_id()[12:]}"
    if record.id:
        keyed = _REQUEST.model_copy(update={"idempotency_key": chain_key(record.id, 0)})
        await Idempotency(store).remember(keyed, job_id, 1, _TENANT)
    journal = JobJournal(store)
    await journal.accept(job_id, _REQUEST, "p", _TENANT, record.attachment())
    return record.held_by(job_id)


async def _of_jobs(records: PromptRecords, jobs: list[str]) -> list[PromptRecord]:
    return [record async for record, _ in records.of_jobs(jobs, _TENANT)]


async def _since(records: PromptRecords, *asked: object) -> list[int]:
    return [record.created_ms async for record in records.since(_TENANT, *asked)]  # type: ignore[arg-type]


async def test_a_prompt_is_found_by_its_id_and_by_each_of_its_jobs():
    store = MemoryStore()
    records, journal = PromptRecords(store), JobJournal(store)
    drawn = await _accepted(store, _record())
    assert drawn.id == drawn_id(drawn.job)
    other, stranger = new_job_id(), new_job_id()
    for job_id in (other, stranger):
        attachment = OtherChain(prompt_id="order-17").attachment()
        await journal.accept(job_id, _REQUEST, "p", _TENANT, attachment)
    named = await _accepted(store, _record("order-17", jobs=("", other)))
    native = new_job_id()
    await journal.accept(native, _REQUEST, "p", _TENANT)
    for record in (drawn, named):
        assert await records.find(record.id, _TENANT) == record
        assert await records.find(record.id, "another") is None
        assert [await records.of_job(each.job, _TENANT) for each in record.chains] == [
            record for _ in record.chains
        ]
        assert await records.of_job(record.job, "another") is None
    # A job of a prompt that was refused, one of another door, and one that there is not.
    for job_id in (stranger, native, new_job_id()):
        assert await records.of_job(job_id, _TENANT) is None
        assert await records.find(drawn_id(job_id), _TENANT) is None
    # Its job's id does not name a prompt that has another one.
    assert await records.find(drawn_id(named.job), _TENANT) is None
    jobs = [native, other, drawn.job, stranger, named.job]
    assert await _of_jobs(records, jobs) == [named, drawn]
    assert await records.newest(_TENANT, 64) == [drawn, named]


async def test_what_is_removed_from_history_can_come_back():
    store = MemoryStore()
    records = PromptRecords(store)
    first, second = [await _accepted(store, _record(name)) for name in ("a", "b")]
    await records.forget(first)
    assert await records.newest(_TENANT, 64) == [second]
    assert [await records.is_listed(each) for each in (first, second)] == [False, True]
    assert await records.find("a", _TENANT) == first
    for _ in range(2):
        await records.remember(first)
        assert await records.newest(_TENANT, 64) == [first, second]
    assert len(await store.list_keys("listing/")) == 2


async def test_what_stands_in_a_job_and_is_no_prompt_is_said():
    store = MemoryStore()
    records = PromptRecords(store)
    damaged, whole = [await _accepted(store, _record(name)) for name in ("a", "b")]
    key = f"jobs/{damaged.job}/request.json"
    line = (await store.get(key) or b"").partition(b"\n")[0]
    await store.put(key, line + b'\n{"id": 5}', "application/json")
    with pytest.raises(RecordUnreadable):
        await records.find("a", _TENANT)
    assert await records.newest(_TENANT, 64) == [whole]


@pytest.mark.parametrize(
    "meddled",
    [
        b'{"prompt_id": "a"}',  # it leads to itself
        _record("a").model_copy(update={"chains": ()}).model_dump_json().encode(),
        _record("a").model_copy(update={"tenant": "another"}).model_dump_json().encode(),
    ],
    ids=["circle", "no chain", "another tenant"],
)
async def test_what_somebody_has_put_into_a_job_hides_no_other_prompt(meddled: bytes):
    store = MemoryStore()
    records = PromptRecords(store)
    damaged, whole = [await _accepted(store, _record(name)) for name in ("a", "b")]
    key = f"jobs/{damaged.job}/request.json"
    line = (await store.get(key) or b"").partition(b"\n")[0]
    await store.put(key, line + b"\n" + meddled, "application/json")
    assert await records.newest(_TENANT, 64) == [whole]
    assert await _of_jobs(records, [damaged.job, whole.job]) == [whole]
    for asked in (records.find("a", _TENANT), records.of_job(damaged.job, _TENANT)):
        with contextlib.suppress(RecordUnreadable):
            assert await asked is None


def test_a_record_whose_nodes_are_gone_has_an_entry_all_the_same():
    record = _record("a").model_copy(update={"prompt": {"5": 1}})
    chain = record.chains[0].model_copy(update={"outputs": {"7": "kelvin"}})
    entry = history_entry(record.model_copy(update={"chains": (chain,)}), [None])
    assert entry["status"]["status_str"] == "error"


async def test_prompts_since_a_time_are_all_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_prompts, "_LISTED_AT_ONCE", 3)
    store = MemoryStore()
    records = PromptRecords(store)
    jobs = []
    for at in range(1, 21):
        jobs.append(f"{at:012x}{new_job_id()[12:]}")
        await _accepted(store, _record(created_ms=at), jobs[-1])
    newest_first = list(range(20, 0, -1))
    assert await _since(records, 0) == newest_first
    assert await _since(records, 1) == newest_first
    assert await _since(records, 15) == newest_first[:6]
    assert await _since(records, 21) == []
    assert await _since(records, 15, set(jobs[16:])) == [16, 15]


def test_ids_since_a_time_begin_with_the_first():
    assert first_job_id(255) == "0000000000ff" + "0" * 20
    assert first_job_id(-5) == "0" * 32
