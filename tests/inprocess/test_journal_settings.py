"""Where the journal lies: with the pictures, in a store of its own, or nowhere but in memory."""

from __future__ import annotations

from unittest.mock import AsyncMock

import httpx
import pytest

from serve.config import Settings, StorageSettings, load_settings
from serve.errors import ConfigurationError, JobNotFound, StorageUnavailable
from serve.journal_settings import JournalSettings
from serve.pipeline import Pipeline
from serve.record_store import MemoryStore, RecordStore
from serve.storage import ObjectStore
from serve.storage_probe import probe_stores
from tests.inprocess.faulty_server import ignoring_conditions, serving
from tests.inprocess.stand_in_stages import REQUEST, StandIn, follow, new_pipeline


async def status_of(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(
        pipeline._models.own.readiness, "replicas", AsyncMock(return_value={"denoise": []})
    )
    journal: dict[str, object] = (await pipeline.status())["journal"]
    return journal


async def test_without_a_journal_jobs_are_said_to_die_with_their_process(
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    off = JournalSettings(enabled=False)
    pipeline = new_pipeline(StandIn(), storage, monkeypatch, journal=off)
    await pipeline.check_health()
    assert "journal.enabled" in caplog.text
    submitted = await pipeline.submit(REQUEST.model_copy(update={"idempotency_key": "k"}))
    assert not submitted.durable
    assert (await follow(pipeline, submitted.id))[-1].event == "stored"
    record = await pipeline.job(submitted.id)
    assert (record.status, record.durable) == ("succeeded", False)
    assert record.result is not None
    assert httpx.get(record.result.images[0].url, trust_env=False).status_code == 200
    again = await pipeline.submit(REQUEST.model_copy(update={"idempotency_key": "k"}))
    assert again.id == submitted.id
    assert (await status_of(pipeline, monkeypatch))["durable"] is False
    keys = await ObjectStore(storage).list_keys("")
    assert [key.split("/")[0] for key in keys] == ["images"]
    with pytest.raises(JobNotFound):
        await new_pipeline(StandIn(), storage, monkeypatch, journal=off).job(submitted.id)


async def test_a_journal_of_its_own(storage: StorageSettings, monkeypatch: pytest.MonkeyPatch):
    records = storage.model_copy(update={"prefix": f"{storage.prefix}records/"})
    pictures = storage.model_copy(update={"prefix": f"{storage.prefix}pictures/"})
    own = JournalSettings(storage=records)
    pipeline = new_pipeline(StandIn(), pictures, monkeypatch, journal=own)
    result = await pipeline.generate(REQUEST)
    assert httpx.get(result.images[0].url, trust_env=False).status_code == 200
    record = await pipeline.job(result.id)
    assert record.durable
    assert record.result is not None
    assert httpx.get(record.result.images[0].url, trust_env=False).status_code == 200
    folders = {key.split("/")[0] for key in await ObjectStore(records).list_keys("")}
    assert folders == {"jobs", "leases", "listing"}
    assert {key.split("/")[0] for key in await ObjectStore(pictures).list_keys("")} == {"images"}
    checks = await probe_stores(Settings(storage=pictures, journal=own))
    names = [check.name for check in checks if check.ok]
    assert len(names) == len(checks)
    assert "journal_s3_conditional_put" in names
    assert "s3_conditional_put" not in names


async def test_a_store_that_ignores_conditions_takes_pictures_and_no_journal(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    with serving(ignoring_conditions()) as url:
        lax = storage.model_copy(update={"endpoint_url": url, "prefix": ""})
        refused = new_pipeline(StandIn(), lax, monkeypatch)
        for _ in range(2):
            with pytest.raises(StorageUnavailable, match="ignores conditional writes") as caught:
                await refused.submit(REQUEST)
            assert caught.value.field == "journal.storage"
        both = new_pipeline(StandIn(), lax, monkeypatch, journal=JournalSettings(storage=storage))
        assert (await both.generate(REQUEST)).images[0].s3_uri.startswith("s3://kelvin/images/")
    with serving(ignoring_conditions()) as url:
        checks = await probe_stores(Settings(storage=lax.model_copy(update={"endpoint_url": url})))
        assert not checks[-1].ok
        assert "the journal may not" in checks[-1].detail


def test_jobs_in_memory_need_one_pipeline():
    overrides = {"journal": {"enabled": False}, "pipeline": {"num_replicas": 2}}
    with pytest.raises(ConfigurationError, match="without a journal"):
        load_settings(overrides=overrides)


@pytest.mark.parametrize("kind", ["s3", "memory"])
async def test_memory_does_what_the_store_does(storage: StorageSettings, kind: str):
    store: RecordStore = ObjectStore(storage) if kind == "s3" else MemoryStore()
    text = "text/plain"
    assert await store.get("a/b") is None
    assert await store.get_with_etag("a/b") is None
    assert await store.swap("a/b", b"1", text, '"other"') is None
    assert await store.put("a/b", b"1", text, if_absent=True)
    assert not await store.put("a/b", b"2", text, if_absent=True)
    found = await store.get_with_etag("a/b")
    assert found is not None
    assert found[0] == b"1"
    assert await store.list_etags("a/") == {"a/b": found[1]}
    assert await store.swap("a/b", b"3", text, None) is None
    etag = await store.swap("a/b", b"3", text, found[1])
    assert etag not in (None, found[1])
    assert await store.swap("a/b", b"4", text, found[1]) is None
    assert await store.put("a/a", b"5", text)
    assert await store.list_keys("a/") == ["a/a", "a/b"]
    assert await store.get("a/b") == b"3"
    await store.delete("a/b")
    await store.delete("a/b")
    assert not await store.exists("a/b")
    assert await store.exists("a/a")


async def test_memory_is_bounded():
    store = MemoryStore(most=3)
    for number in range(5):
        await store.put(f"{number}", b"", "text/plain")
    assert await store.list_keys("") == ["2", "3", "4"]
