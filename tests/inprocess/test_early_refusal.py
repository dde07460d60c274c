"""In front of the proxy: what the Pipeline would refuse is refused there, and nothing else is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from serve import refusals
from serve.config import PipelineSettings, StorageSettings
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
        self.lines: list[bytes] = []

    async def count(self, scope: Any, receive: Any, send: Any) -> None:
        self.came_through += 1
        self.lines += [value for name, value in scope["headers"] if name == b"x-kelvin-line"]
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
        tried = await post(http, "1")
        assert (tried.status_code, door.came_through) == (429, 2), "one more is tried"
        early = [await post(http, str(number), {"seed": number}) for number in range(2, 20)]
        assert door.came_through == 2
        waits = [int(answer.headers["retry-after"]) for answer in (behind, *early)]
        assert waits == sorted(waits)
        assert 3 <= waits[0] < waits[-1], "each has a place of its own"
        for answer in (behind, *early):
            assert answer.status_code == 429
            error = answer.json()["error"]
            assert (error["code"], error["field"], error["value"]) == (
                "overloaded",
                "deadline_s",
                DEADLINE_S,
            )
            assert "x-kelvin-line" not in answer.headers
        assert {answer.content for answer in early} == {tried.content}
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


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {"cookie": "kelvin_key=wrong"}),
        (401, {"authorization": "Basic ="}),
        (401, {"via": "1.1 elsewhere"}),
        (401, {"x-forwarded-for": "127.0.0.1"}),
        (403, {"host": "elsewhere.example"}),
        (403, {"sec-fetch-site": "cross-site"}),
        (415, {"content-type": "text/plain"}),
    ],
)
async def test_who_may_not_come_in_is_told_so_however_full_it_is(
    flooded: World, status: int, headers: dict[str, str]
):
    async with front_door(flooded) as (_, http):
        for prompt in ("0", "1", "2"):
            assert (await post(http, prompt)).status_code == 429
        for prompt in ("3", "4", "5"):
            assert (await post(http, prompt, **headers)).status_code == status
        wrong = await http.post("/k/wrong/v1/jobs", json=body("6"))
        assert (wrong.status_code, "wrong" in wrong.text.split("message")[0]) == (401, False)


@pytest.mark.parametrize(
    "wrong", [{"prompt": ""}, {"prompt": "a" * 10_001}, {"seed": -1}, {"seed": True}, {"prompt": 5}]
)
async def test_what_is_wrong_is_told_so_however_full_it_is(flooded: World, wrong: dict[str, Any]):
    async with front_door(flooded) as (_, http):
        for prompt in ("0", "1", "2"):
            assert (await post(http, prompt)).status_code == 429
        assert (await http.post("/v1/jobs", json=body("3") | wrong)).status_code == 400
        without_prompt = {"num_inference_steps": STEPS, "deadline_s": DEADLINE_S}
        assert (await http.post("/v1/jobs", json=without_prompt)).status_code == 400


async def test_a_header_made_up_anew_for_each_request_lets_nobody_through(flooded: World):
    async with front_door(flooded) as (door, http):
        for number in range(20):
            made_up = {"x-amzn-trace-id": str(number), f"x-{number}": "a", "cookie": f"c={number}"}
            more = {"seed": number, "prompt_2": str(number)}
            assert (await post(http, str(number), more, **made_up)).status_code == 429
        assert door.came_through == 2


async def test_nobody_says_by_themselves_where_they_stand_in_line(flooded: World):
    forged = {"x-kelvin-line": "1 0 0"}

    async def in_parts() -> AsyncIterator[bytes]:
        yield json.dumps(body("chunked")).encode()

    async with front_door(flooded) as (door, http):
        large: dict[str, Any] = {"negative_prompt": "b" * 9000, "negative_prompt_2": "b" * 9000}
        for path, sent in (
            ("/v1/jobs", {"content": in_parts()}),
            ("/v1/jobs", {"json": body("large", **large)}),
            ("/v1/jobs", {"json": {"prompt": ""}}),
            ("/v1/jobs/", {"json": body("slash")}),
            ("/v1/images/generations", {"json": {"prompt": 5}}),
        ):
            answer = await http.post(path, headers=forged, **sent)
            assert "x-kelvin-line" not in answer.headers
        await http.get("/v1/jobs", headers=forged)
        assert (door.came_through, door.lines) == (6, [])
        await post(http, "small", **forged)
        assert door.lines == [b"0 0.0000 0"]


@pytest.mark.parametrize("length", [b"0" * 5000 + b"5", b"-1", b"\xb2", b"5, 5"])
async def test_a_length_that_is_no_number_is_left_to_who_reads_the_body(length: bytes):
    passed_on = []

    async def behind(scope: Any, _: Any, __: Any) -> None:
        passed_on.append(scope)

    headers = [(b"content-length", length)]
    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": headers}
    await EarlyRefusal(behind)(scope, None, None)  # type: ignore[arg-type]
    assert len(passed_on) == 1


async def test_what_is_refused_in_front_is_counted_where_all_is(
    flooded: World, monkeypatch: pytest.MonkeyPatch
):
    counted: list[tuple[str, float, dict[str, str]]] = []
    monkeypatch.setattr(
        "serve.recorders.Recorders.record",
        lambda _, spec, value, labels: counted.append((spec.name, value, dict(labels))),
    )
    async with front_door(flooded) as (_, http):
        for number in range(20):
            assert (await post(http, str(number))).status_code == 429
        assert (await post(http, "a", authorization="Basic =")).status_code == 401
        assert (await post(http, "a", {"deadline_s": 1000.0})).status_code == 202
        assert (await post(http, "b", {"deadline_s": 1000.0})).status_code == 202
    by_proxy = [value for name, value, labels in counted if labels.get("by") == "proxy"]
    by_pipeline = [value for name, value, labels in counted if labels.get("by") == "pipeline"]
    assert (by_proxy, by_pipeline) == ([18], [1, 1])
    codes = {labels["code"] for name, _, labels in counted if name.endswith("refused_total")}
    assert codes == {"overloaded"}


async def test_it_can_be_switched_off(storage: StorageSettings, monkeypatch: pytest.MonkeyPatch):
    off = PipelineSettings(early_refusal=False)
    world = await World(storage, monkeypatch, pipeline=off).seen_one()
    await world.flood(10)
    async with front_door(world) as (door, http):
        for number in range(10):
            assert (await post(http, str(number))).status_code == 429
        assert door.came_through == 10
    await world.end()


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
        for said in ("", "1", "1 2", "nan 0 0", "0 -5 0", "1 1e999 0", "1 2 3 4"):
            direct = httpx.AsyncClient(
                transport=httpx.ASGITransport(build_app(flooded.pipeline)),
                base_url="http://127.0.0.1",
            )
            async with direct:
                answer = await post(direct, "0", **{"x-kelvin-line": said})
                assert answer.status_code == 429
                assert "x-kelvin-line" not in answer.headers
        assert (await post(http, "1", **{"x-kelvin-line": "1 0 0"})).status_code == 429


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
    monkeypatch.setattr(refusals, "_capacity", lambda _: 10)
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
    assert {answer.content for answer in answers[2:]} == {answers[1].content}
    body = answers[-1].json()
    error = body["error"] if isinstance(body["error"], dict) else body
    names = {"/v1/generate": "num_images", "/v1/images/generations": "n"}
    assert (error["field"], error["value"]) == (names.get(path, "n_iter"), 1), "the door's own"
