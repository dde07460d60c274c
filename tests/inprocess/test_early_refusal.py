"""In front of the proxy: what the Pipeline would refuse is refused there, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from serve import admission
from serve.config import StorageSettings
from serve.http.early_refusal import EarlyRefusal
from serve.http.native import build_app
from serve.keys import new_key
from tests.inprocess.test_admission import STEPS, World

DEADLINE_S = 15.0


class Door:
    """The app behind its front door, which counts what comes through."""

    def __init__(self, world: World) -> None:
        self._app = build_app(world.pipeline)
        self.app = EarlyRefusal(self.count, clock=lambda: world.now)
        self.came_through = 0

    async def count(self, scope: Any, receive: Any, send: Any) -> None:
        self.came_through += 1
        await self._app(scope, receive, send)


@asynccontextmanager
async def front_door(world: World) -> AsyncIterator[tuple[Door, httpx.AsyncClient]]:
    door = Door(world)
    transport = httpx.ASGITransport(door.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield door, http


@pytest.fixture
async def flooded(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    world = await World(storage, monkeypatch).seen_one()
    await world.flood(10)
    yield world
    await world.end()


def body(prompt: str, deadline_s: float | None = DEADLINE_S, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "num_inference_steps": STEPS, "deadline_s": deadline_s, **more}


async def post(http: httpx.AsyncClient, *asked: Any, **headers: str) -> httpx.Response:
    more = asked[1] if len(asked) > 1 else {}
    return await http.post("/v1/jobs", json=body(asked[0], **more), headers=headers)


async def test_it_tells_equal_requests_what_the_pipeline_said(flooded: World):
    async with front_door(flooded) as (door, http):
        behind = await post(http, "0")
        assert (await post(http, "1")).status_code == 429
        assert door.came_through == 2, "one more is tried"
        early = [await post(http, str(number), {"seed": number}) for number in range(2, 20)]
        assert door.came_through == 2
        waits = [int(answer.headers["retry-after"]) for answer in (behind, *early)]
        assert waits == sorted(waits)
        assert 3 <= waits[0] < waits[-1], "each has a place of its own"
        for answer in (behind, *early):
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "overloaded"
            assert "x-kelvin-line" not in answer.headers
        assert early[0].headers["x-request-id"]
        named = await post(http, "20", **{"x-request-id": "mine"})
        assert named.headers["x-request-id"] == "mine"


async def test_what_differs_reaches_the_pipeline(flooded: World):
    key, _ = new_key("acme", ("generate",))
    async with front_door(flooded) as (door, http):
        for prompt in ("0", "1", "2"):
            assert (await post(http, prompt)).status_code == 429
        assert door.came_through == 2
        assert (await post(http, "3", {"deadline_s": 1000.0})).status_code == 202
        assert (await post(http, "4", {"deadline_s": None})).status_code == 202
        assert (await post(http, "5", {"unknown": 1})).status_code == 400
        assert (await post(http, "6", authorization=f"Bearer {key}")).status_code == 401
        assert (await post(http, "7", origin="http://elsewhere.example")).status_code == 403
        assert (await http.post("/v1/jobs", content=b"no json")).status_code == 400
        assert (await http.post("/v1/jobs", content=b"[" * 9000)).status_code == 400
        assert (await http.get("/v1/jobs")).status_code == 200
        assert door.came_through == 10


async def test_the_job_of_a_known_key_is_found_however_full_it_is(flooded: World):
    async with front_door(flooded) as (_, http):
        first = await post(http, "mine", {"deadline_s": 1000.0}, **{"idempotency-key": "k"})
        for prompt in ("0", "1", "2"):
            assert (await post(http, prompt, {"deadline_s": 1.0})).status_code in (429, 504)
        again = await post(http, "mine", {"deadline_s": 1000.0}, **{"idempotency-key": "k"})
        named = await post(http, "mine", {"deadline_s": 1000.0, "idempotency_key": "k"})
        assert first.json()["id"] == again.json()["id"] == named.json()["id"]


async def test_who_was_refused_in_front_and_comes_when_told_goes_before_others(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    jobs = await world.flood(4)
    async with front_door(world) as (door, http):
        for prompt in ("0", "1"):
            assert (await post(http, prompt)).status_code == 429
        told = await post(http, "mine")
        assert (told.status_code, door.came_through) == (429, 2)
        await world.pipeline.cancel(jobs[0])
        await world.until_running(3)
        world.now += float(told.headers["retry-after"])
        assert (await post(http, "another")).status_code == 429
        assert (await post(http, "mine")).status_code == 202
        assert door.came_through == 4
    await world.end()


async def test_a_line_that_is_none_is_not_believed(flooded: World):
    async with front_door(flooded) as (_, http):
        for said in ("", "1", "nan 0", "0 -5", "1 1e999", "1 2 3"):
            direct = httpx.AsyncClient(
                transport=httpx.ASGITransport(build_app(flooded.pipeline)),
                base_url="http://127.0.0.1",
            )
            async with direct:
                answer = await post(direct, "0", **{"x-kelvin-line": said})
                assert answer.status_code == 429
                assert "x-kelvin-line" not in answer.headers
        assert (await post(http, "1", **{"x-kelvin-line": "1 0"})).status_code == 429


@pytest.mark.parametrize("comes_at_once", [True, False])
async def test_who_sends_slowly_is_passed_on_with_what_came(comes_at_once: bool):
    parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    passed_on = asyncio.Event()
    seen = b""

    async def behind(_: Any, receive: Any, __: Any) -> None:
        nonlocal seen
        passed_on.set()
        seen = b"".join([(await receive())["body"] for _ in range(2)])

    def part(data: bytes, *, is_last: bool) -> None:
        parts.put_nowait({"type": "http.request", "body": data, "more_body": not is_last})

    headers = [(b"content-length", b"15")]
    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": headers}
    call = asyncio.create_task(EarlyRefusal(behind)(scope, parts.get, None))  # type: ignore[arg-type]
    if comes_at_once:
        part(b'{"prompt"', is_last=False)
    async with asyncio.timeout(20):
        await passed_on.wait()
    if not comes_at_once:
        part(b'{"prompt"', is_last=False)
    part(b': "a"}', is_last=True)
    async with asyncio.timeout(20):
        await call
    assert seen == b'{"prompt": "a"}'


@pytest.mark.parametrize(
    "path", ["/v1/generate", "/v1/images/generations", "/sdapi/v1/txt2img", "/k/KEY/v1/jobs"]
)
async def test_requests_without_a_deadline_are_refused_in_front_while_there_is_no_room(
    flooded: World, monkeypatch: pytest.MonkeyPatch, path: str
):
    monkeypatch.setattr(admission, "_capacity", lambda _: 10)
    path = path.replace("KEY", new_key("acme", ("generate",))[0])
    async with front_door(flooded) as (door, http):
        answers = [await http.post(path, json={"prompt": str(number)}) for number in range(9)]
    if path.startswith("/k/"):
        # Nobody has this key: that is no refusal for want of room.
        assert [answer.status_code for answer in answers] == [401] * 9
        return
    assert [answer.status_code for answer in answers] == [429] * 9
    assert door.came_through == 2
    waits = [int(answer.headers["retry-after"]) for answer in answers]
    assert waits == sorted(waits)
    assert answers[-1].json().keys() == answers[0].json().keys(), "in the door's own words"
