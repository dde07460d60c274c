"""API keys: what is kept of them, where, and how soon a change counts."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Status, StatusCode

from serve import key_ring
from serve.__main__ import main
from serve.config import Settings, load_settings
from serve.errors import ConfigurationError, StorageUnavailable
from serve.exposure import refuse_open_door
from serve.key_ring import REVOKED_WITHIN_S, KeyRing
from serve.key_store import FileKeys, KeyStore, ObjectKeys, key_store
from serve.keys import KeyRecord, digest_of, new_key, without_keys
from serve.record_store import MemoryStore
from serve.trace_redaction import WithoutKeys


@pytest.fixture(params=["file", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> KeyStore:
    if request.param == "file":
        return FileKeys(tmp_path / "deep" / "keys.json")
    return ObjectKeys(MemoryStore())


async def test_a_store_knows_exactly_the_keys_that_were_added_and_not_removed(store: KeyStore):
    assert await store.records() == {}
    records = [new_key("acme", ("generate",))[1] for _ in range(3)]
    for record in records:
        await store.add(record)
    await store.remove(records[1].digest)
    await store.remove("0" * 64)
    assert await store.records() == {each.digest: each for each in (records[0], records[2])}


async def test_only_a_digest_is_kept_and_only_for_the_owner(tmp_path: Path):
    path = tmp_path / "keys.json"
    key, record = new_key("acme", ("admin",))
    await FileKeys(path).add(record)
    assert key.removeprefix("kelvin_") not in path.read_text()
    assert record.digest == digest_of(key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_record_under_another_digest_counts_for_nothing(tmp_path: Path):
    _, record = new_key("acme", ("admin",))
    objects = MemoryStore()
    moved = f"keys/{'0' * 64}.json"
    await objects.put(moved, record.model_dump_json().encode(), "application/json")
    await objects.put("keys/garbage.json", b"not json", "application/json")
    assert await ObjectKeys(objects).records() == {}
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"0" * 64: record.model_dump()}))
    assert await FileKeys(path).records() == {}


async def test_a_damaged_file_lets_nobody_in_and_is_named(tmp_path: Path):
    path = tmp_path / "keys.json"
    path.write_text("[1]")
    with pytest.raises(ConfigurationError) as caught:
        await FileKeys(path).records()
    assert caught.value.value == str(path)


async def test_writers_at_once_lose_no_key(tmp_path: Path):
    path = tmp_path / "keys.json"
    records = [new_key("acme", ("generate",))[1] for _ in range(20)]
    await asyncio.gather(*(FileKeys(path).add(record) for record in records))
    assert (await FileKeys(path).records()).keys() == {record.digest for record in records}


class Counting:
    """A store that counts, and fails when told to."""

    def __init__(self) -> None:
        self.known: dict[str, KeyRecord] = {}
        self.reads = 0
        self.is_down = False
        self.answers = asyncio.Event()
        self.answers.set()

    async def records(self) -> Mapping[str, KeyRecord]:
        self.reads += 1
        await self.answers.wait()
        if self.is_down:
            raise StorageUnavailable("down")
        return dict(self.known)

    async def add(self, record: KeyRecord) -> None:
        self.known[record.digest] = record

    async def remove(self, digest: str) -> None:
        del self.known[digest]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_a_revoked_key_stops_within_seconds_and_a_new_one_counts_within_one():
    store, clock = Counting(), Clock()
    ring = KeyRing(store, clock)
    key, record = new_key("acme", ("generate",))
    assert await ring.find(key) is None
    await store.add(record)
    clock.now += 1.01
    assert await ring.find(key) == record
    await store.remove(record.digest)
    clock.now += REVOKED_WITHIN_S + 0.01
    assert await ring.find(key) is None


async def test_guessing_costs_the_store_one_read_a_second():
    store, clock = Counting(), Clock()
    ring = KeyRing(store, clock)
    for _ in range(100):
        clock.now += 0.05
        assert await ring.find(new_key("x", ("admin",))[0]) is None
    assert store.reads <= 6
    assert await ring.find("kelvin_short") is None
    assert await ring.find("") is None


async def test_known_keys_outlive_an_outage_of_minutes_but_no_longer():
    store, clock = Counting(), Clock()
    ring = KeyRing(store, clock)
    key, record = new_key("acme", ("generate",))
    await store.add(record)
    assert await ring.find(key) == record
    store.is_down = True
    clock.now += 200.0
    assert await ring.find(key) == record
    clock.now += 200.0
    with pytest.raises(StorageUnavailable):
        await ring.find(key)


async def test_a_store_that_hangs_holds_up_nobody_whose_key_is_known(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(key_ring, "_PATIENCE_S", 0.05)
    store, clock = Counting(), Clock()
    ring = KeyRing(store, clock)
    key, record = new_key("acme", ("generate",))
    await store.add(record)
    assert await ring.find(key) == record
    store.answers.clear()
    clock.now += 10.0
    async with asyncio.timeout(5.0):
        # One who guesses makes it be asked, and those who know wait for neither.
        guess = new_key("acme", ("admin",))[0]
        found = await asyncio.gather(*map(ring.find, [guess, *[key] * 50]))
    assert found == [None, *[record] * 50]
    assert store.reads == 2
    clock.now += 400.0
    strangers = asyncio.create_task(ring.find(key))
    assert not (await asyncio.wait({strangers}, timeout=0.2))[0], "known for too long"
    store.answers.set()
    assert await strangers == record


async def test_without_any_answer_ever_nobody_comes_in():
    store = Counting()
    store.is_down = True
    with pytest.raises(StorageUnavailable):
        await KeyRing(store, Clock()).find(new_key("acme", ("generate",))[0])


def test_keys_are_blotted_out_of_any_text():
    key, record = new_key("acme", ("generate",))
    text = without_keys(f"GET /k/{key}/v1/jobs, {key[:30]} and {key}x")
    assert key[:20] not in text
    assert text.endswith("kelvin_*** and kelvin_***")
    assert without_keys(record.id) == record.id
    assert without_keys("kelvin_images_total") == "kelvin_images_total"


def test_no_span_carries_a_key() -> None:
    key, _ = new_key("acme", ("generate",))
    sent = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(WithoutKeys(sent)))
    tracer = provider.get_tracer("ray")
    # As Ray Serve's proxy does, where it is told to trace.
    with tracer.start_as_current_span(f"proxy_http_request pipeline GET /k/{key}/v1/jobs") as span:
        span.set_attribute("request_route_path", f"/k/{key}/v1/jobs")
        span.set_attribute("http.status_code", 200)
        span.set_attribute("http.request.header.referer", [f"http://x/k/{key}/page"])
        span.set_status(Status(StatusCode.ERROR, f"no route /k/{key}/v1/job"))
        span.add_event("seen", {"path": f"/k/{key}/v1/jobs"})
    (told,) = sent.get_finished_spans()
    assert told.name == "proxy_http_request pipeline GET /k/kelvin_***/v1/jobs"
    assert told.attributes == {
        "request_route_path": "/k/kelvin_***/v1/jobs",
        "http.status_code": 200,
        "http.request.header.referer": ("http://x/k/kelvin_***/page",),
    }
    assert told.status.description == "no route /k/kelvin_***/v1/job"
    assert told.context == span.get_span_context()
    assert key[10:30] not in told.to_json()


@pytest.mark.parametrize("place", ["name", "attribute", "in a list", "status", "event"])
def test_a_key_is_found_wherever_in_a_span_it_is(place: str) -> None:
    key, _ = new_key("acme", ("generate",))
    sent = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(WithoutKeys(sent)))
    with provider.get_tracer("ray").start_as_current_span(key if place == "name" else "x") as span:
        if place == "attribute":
            span.set_attribute("at", f"/k/{key}")
        elif place == "in a list":
            span.set_attribute("at", ["x", f"/k/{key}"])
        elif place == "status":
            span.set_status(Status(StatusCode.ERROR, key))
        elif place == "event":
            span.add_event("seen", {"at": key})
    (told,) = sent.get_finished_spans()
    assert "kelvin_***" in told.to_json()
    assert key[10:30] not in told.to_json()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_makes_lists_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--set", f"keys.file={tmp_path / 'keys.json'}")
    code, made = run(capsys, "keys", "create", "--tenant", "acme", "--role", "admin", *where)
    assert code == 0
    code, listed = run(capsys, "keys", "list", *where)
    (shown,) = listed["keys"]
    assert shown == {name: value for name, value in made.items() if name != "key"}
    assert str(made["key"]) not in json.dumps(listed)
    assert (shown["tenant"], shown["roles"]) == ("acme", ["admin"])
    code, error = run(capsys, "keys", "revoke", str(made["key"]), *where)
    assert code == 1
    assert str(made["key"])[:20] not in json.dumps(error)
    assert run(capsys, "keys", "revoke", str(made["id"]), *where) == (0, {"revoked": made["id"]})
    assert run(capsys, "keys", "list", *where)[1] == {"keys": []}


@pytest.mark.parametrize(
    "wrong", [("--tenant", "Acme/../x"), ("--role", "root"), ("--label", "x" * 201)]
)
def test_the_command_names_what_is_wrong(
    wrong: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--set", f"keys.file={tmp_path / 'keys.json'}")
    code, error = run(capsys, "keys", "create", *wrong, *where)
    assert code == 2
    assert error["error"]["field"] == wrong[0].removeprefix("--")
    assert not (tmp_path / "keys.json").exists()


def test_listening_to_others_without_a_key_is_refused_unless_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def settings(**http: object) -> Settings:
        return load_settings(overrides={"http": http, "keys": {"file": str(file)}})

    refuse_open_door(settings())
    refuse_open_door(settings(host="0.0.0.0", open_to_all=True))
    for host in ("0.0.0.0", "192.168.1.7", "::"):
        with pytest.raises(ConfigurationError) as caught:
            refuse_open_door(settings(host=host))
        assert caught.value.field == "http.host"
        assert "kelvin keys create" in str(caught.value.allowed)
    asyncio.run(key_store(settings()).add(new_key("acme", ("generate",))[1]))
    refuse_open_door(settings(host="0.0.0.0"))
