"""Jobs: accepted, followed, cancelled, read from the store."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from serve.errors import JobCancelled
from serve.jobs import JobJournal
from serve.requests import GenerateRequest
from serve.storage import ObjectStore
from tests.ray.events import following
from tests.ray.world import ENDLESS, FAST, World, wait_until


def idle(world: World) -> bool:
    status = world.http.get("/v1/status").json()
    queued = sum(replica["queue_length"] for replica in status["stages"]["denoise"])
    return bool(status["pipeline"]["running_jobs"] == 0 and queued == 0)


def pending(world: World) -> list[str]:
    async def read() -> list[str]:
        return await JobJournal(ObjectStore(world.storage)).pending()

    return asyncio.run(read())


def test_a_job_is_followed_from_queued_to_stored(world: World):
    answer = world.http.post("/v1/jobs", json=FAST | {"num_inference_steps": 6, "num_images": 2})
    assert answer.status_code == 202
    record = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{record['id']}"
    assert record["status"] == "pending"
    assert record["request"]["model"]
    with following(world.http, record["id"]) as stream:
        events = list(stream)
    names = [event["event"] for event in events]
    assert names[:2] == ["queued", "text"]
    assert names[-1] == "stored"
    for image in (0, 1):
        own = [event for event in events if event.get("image") == image]
        assert [event.get("step") for event in own] == [1, 2, 3, 4, 5, 6, None]
        assert own[-1]["event"] == "decode"
    stored = world.http.get(f"/v1/jobs/{record['id']}").json()
    assert stored["status"] == "succeeded"
    assert [image["sha256"] for image in stored["result"]["images"]] == [
        image["sha256"] for image in events[-1]["result"]["images"]
    ]
    assert world.fetch(stored["result"]["images"][0])


def test_events_come_while_the_job_runs(world: World):
    job_id = world.submit(**ENDLESS)
    with following(world.http, job_id) as events:
        first = next(event for event in events if event["event"] == "step")
    assert first["steps"] == 200
    # Hanging up on the events does not end the job.
    running = world.http.get(f"/v1/jobs/{job_id}").json()
    assert running["status"] == "running"
    assert running["progress"]["event"] == "step"
    world.http.delete(f"/v1/jobs/{job_id}")
    wait_until(lambda: idle(world))


def test_cancelling_stops_the_denoisers(world: World):
    job_id = world.submit(**ENDLESS)
    with following(world.http, job_id) as events:
        next(event for event in events if event["event"] == "step")
        cancelled = world.http.delete(f"/v1/jobs/{job_id}")
        assert cancelled.status_code == 200
        assert cancelled.json()["status"] == "cancelled"
        assert [event["event"] for event in events if event["event"] != "step"][-1] == "cancelled"
    assert world.http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"
    # Sixteen pictures of 200 steps would keep them busy for much longer than this waits.
    wait_until(lambda: idle(world))
    assert world.http.delete(f"/v1/jobs/{job_id}").status_code == 200
    assert job_id not in pending(world)


def test_a_finished_job_cannot_be_cancelled(world: World):
    job_id = world.generate()["id"]
    answer = world.http.delete(f"/v1/jobs/{job_id}")
    assert answer.status_code == 409
    assert answer.json()["error"]["type"] == "JobConflict"
    assert world.http.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"


@pytest.mark.parametrize("job_id", ["0" * 32, "nonsense", "..%2F..%2Fsecret", "é"])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
def test_an_unknown_job_is_not_found(world: World, job_id: str, method: str, suffix: str):
    answer = world.http.request(method, f"/v1/jobs/{job_id}{suffix}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] in ("JobNotFound", "RouteNotFound")


def test_hanging_up_on_generate_cancels_its_job(world: World):
    before = set(pending(world))
    with pytest.raises(httpx.ReadTimeout):
        world.http.post("/v1/generate", json=ENDLESS, timeout=httpx.Timeout(60, read=1.5))
    wait_until(lambda: idle(world))
    assert set(pending(world)) == before


def test_cancelling_the_handle_call_cancels_its_job(world: World):
    stream = world.handle.options(stream=True).stream.remote(GenerateRequest(**ENDLESS))
    job_id = next(iter(stream)).id
    stream.cancel()
    wait_until(lambda: idle(world))
    record: Any = world.handle.job.remote(job_id).result()
    assert record.status == "cancelled"


def test_whoever_waits_for_a_cancelled_job_is_told(world: World):
    waiting = world.handle.generate.remote(GenerateRequest(**ENDLESS))
    wait_until(lambda: len(pending(world)) == 1)
    (job_id,) = pending(world)
    world.handle.cancel.remote(job_id).result()
    with pytest.raises(JobCancelled) as caught:
        waiting.result()
    assert caught.value.field == "id"
    wait_until(lambda: idle(world))
