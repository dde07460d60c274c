"""The asynchronous client keeps what the blocking one promises, against the same real server."""

from __future__ import annotations

import asyncio
import inspect

import pytest

from serve import errors
from serve.client import AsyncKelvin, Kelvin
from serve.client_errors import PictureCorrupt, ServerUnreachable, UnexpectedAnswer
from serve.keys import new_key
from serve.requests import GenerateRequest, JobEvent
from tests.unit.fake_kelvin import (
    JOB,
    PICTURE,
    FakeKelvin,
    accept,
    image,
    sends,
    served,
    step,
    stored,
    streams,
)

kelvin = pytest.fixture(served)
REQUEST = GenerateRequest(prompt="a circle", seed=1)
EVENTS = f"/v1/jobs/{JOB}/events"


def opened(kelvin: FakeKelvin) -> AsyncKelvin:
    return AsyncKelvin(kelvin.url, timeout_s=20, first_pause_s=0.001)


def test_both_clients_have_the_same_methods():
    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(each).parameters)
            for name, each in vars(kind).items()
            if callable(each) and not name.startswith("_")
        }

    assert methods(Kelvin) == methods(AsyncKelvin)


async def test_generate_survives_a_broken_stream_and_reports_every_event(kelvin: FakeKelvin):
    accept(kelvin)
    last = stored(kelvin)
    kelvin.on("GET", EVENTS, streams(step(1), breaks=True), streams(step(1), step(2), last))
    told: list[JobEvent] = []
    async with opened(kelvin) as client:
        assert await client.generate(REQUEST, told.append) == last.result
    assert [event.step for event in told] == [1, 1, 2, None]


@pytest.mark.parametrize("breaks", [True, False])
async def test_a_stream_that_never_gets_further_is_given_up(kelvin: FakeKelvin, breaks: bool):
    kelvin.on("GET", EVENTS, streams(JobEvent(event="queued", id=JOB), breaks=breaks))
    async with opened(kelvin) as client:
        with pytest.raises(ServerUnreachable if breaks else UnexpectedAnswer):
            await client.wait(JOB)


async def test_whoever_stops_waiting_cancels_the_job(kelvin: FakeKelvin):
    accept(kelvin)
    kelvin.on("GET", EVENTS, streams(step(1)))  # and then a pause, before it is asked again
    begun = asyncio.Event()
    async with AsyncKelvin(kelvin.url, first_pause_s=20) as client:
        waiting = asyncio.create_task(client.generate(REQUEST, lambda _: begun.set()))
        await begun.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert ("DELETE", f"/v1/jobs/{JOB}", b"") in kelvin.seen


async def test_typed_errors_and_keys_are_as_in_the_other_client(kelvin: FakeKelvin):
    error = errors.InvalidRequest("no", field="width", value=17, allowed="a multiple of 16")
    kelvin.on("POST", "/v1/jobs", sends(400, error.body()))
    kelvin.on("GET", "/v1/jobs/0", sends(429, b"dropped", "text/plain"))
    key, _ = new_key("acme", ("generate",))
    kelvin.on(
        "GET",
        "/picture?signature=secret",
        sends(200, PICTURE, "image/png"),
        sends(200, b"x", "image/png"),
    )
    async with AsyncKelvin(kelvin.url, api_key=key) as client:
        with pytest.raises(errors.InvalidRequest) as caught:
            await client.submit(REQUEST)
        assert caught.value.body() == error.body()
        with pytest.raises(errors.Overloaded):
            await client.job("0")
        with pytest.raises(errors.InvalidRequest):
            await client.submit(REQUEST.model_copy(update={"guidance_scale": float("nan")}))
        assert await client.download(image(kelvin)) == PICTURE
        with pytest.raises(PictureCorrupt):
            await client.download(image(kelvin))
    assert {shown for path, shown in kelvin.authorized if "picture" not in path} == {
        f"Bearer {key}"
    }
    assert {shown for path, shown in kelvin.authorized if "picture" in path} == {None}


async def test_jobs_come_page_by_page(kelvin: FakeKelvin):
    def page(*ids: str, following: str | None) -> object:
        return {"jobs": [{"id": each, "status": "cancelled"} for each in ids], "next": following}

    kelvin.on("GET", "/v1/jobs?limit=50", sends(200, page("c", "b", following="b")))
    kelvin.on("GET", "/v1/jobs?limit=50&after=b", sends(200, page("a", following=None)))
    async with opened(kelvin) as client:
        assert [record.id async for record in client.jobs()] == ["c", "b", "a"]
    with Kelvin(kelvin.url) as blocking:
        newest = next(blocking.jobs())
        assert newest.id == "c"
        asked = len(kelvin.seen)
        assert [record.id for record in blocking.jobs()] == ["c", "b", "a"]
    assert len(kelvin.seen) == asked + 2
