"""ComfyUI's prompts in a store: written once each, and found again in order."""

from __future__ import annotations

import asyncio
import uuid

import pytest

from serve.http import comfyui_prompts
from serve.http.comfyui_prompts import ChainRecord, PromptRecord, PromptRecords, order_key
from serve.record_store import MemoryStore

_TENANT = "t"


def _record(name: str, created_ms: int, digest: str = "") -> PromptRecord:
    chain = ChainRecord(job=uuid.uuid4().hex, sampler="5", encoder="2", decoder="6", outputs={})
    return PromptRecord(
        id=name,
        tenant=_TENANT,
        number=0,
        created_ms=created_ms,
        digest=digest,
        prompt={},
        extra_data={},
        chains=(chain,),
        node_errors={},
        warnings=(),
    )


async def _since(records: PromptRecords, *asked: object) -> list[str]:
    return [record.id async for record in records.since(_TENANT, *asked)]  # type: ignore[arg-type]


@pytest.mark.parametrize("created_ms", [9, 11])
async def test_of_two_writes_of_one_id_the_second_leaves_nothing(created_ms: int):
    store = MemoryStore()
    records = PromptRecords(store)
    first, second = _record("p", 10, "one"), _record("p", created_ms, "another")
    written = await asyncio.gather(*map(records.write, (first, second)))
    assert written == [first, first]
    keys = await store.list_keys("comfyui/")
    assert [key for key in keys if "/order/" in key] == [order_key(first)]
    (job,) = (chain.job for chain in second.chains)
    assert not [key for key in keys if job in key]
    assert await records.of_job(job, _TENANT) is None
    await records.forget(first)
    assert await store.list_keys("comfyui/") == []


async def test_a_key_whose_writer_died_lists_nothing():
    store = MemoryStore()
    records = PromptRecords(store)
    record, other = _record("p", 10), _record("q", 11)
    await records.write(record)
    await records.write(other)
    for stray in (_record("p", 12), _record("never written", 13)):
        await store.put(order_key(stray), b"{}", "application/json")
    assert await records.newest(_TENANT, 64) == [record, other]
    assert await _since(records, 0) == ["q", "p"]


async def test_prompts_since_a_time_are_all_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comfyui_prompts, "_LISTED_AT_ONCE", 3)
    records = PromptRecords(MemoryStore())
    written = [await records.write(_record(str(at), at)) for at in range(1, 21)]
    newest_first = [record.id for record in reversed(written)]
    assert await _since(records, 0) == newest_first
    assert await _since(records, 1) == newest_first
    assert await _since(records, 15) == newest_first[:6]
    assert await _since(records, 21) == []
    known = {order_key(record) for record in written[16:]}
    assert await _since(records, 15, known) == ["16", "15"]
