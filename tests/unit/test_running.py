"""A live job's events: everybody sees all of them, in order, whenever they come."""

from __future__ import annotations

import asyncio

import pytest

from serve import running as running_module
from serve.errors import DeadlineExceeded, StageFailed
from serve.requests import GenerateRequest, JobEvent
from serve.running import RunningJob


def event(name: str, step: int | None = None) -> JobEvent:
    return JobEvent.model_validate({"event": name, "id": "1", "step": step})


def new_job() -> RunningJob:
    return RunningJob("1", GenerateRequest(prompt="a"))


async def collect(job: RunningJob) -> list[JobEvent]:
    return [event async for event in job.follow()]


async def test_early_and_late_followers_see_the_same():
    job = new_job()
    early = asyncio.create_task(collect(job))
    await asyncio.sleep(0)
    job.publish(event("queued"))
    await asyncio.sleep(0)
    middle = asyncio.create_task(collect(job))
    for step in range(1, 50):
        job.publish(event("step", step))
        if step % 7 == 0:
            await asyncio.sleep(0)
    job.publish(event("failed"))
    late = await collect(job)
    assert [seen.event for seen in late] == ["queued", *["step"] * 49, "failed"]
    assert await early == await middle == late


async def test_nothing_follows_the_last_event():
    job = new_job()
    job.publish(event("cancelled"))
    job.publish(event("step", 1))
    assert [seen.event for seen in await collect(job)] == ["cancelled"]
    assert job.is_over


async def test_only_the_newest_previews_are_kept_and_none_once_it_is_over(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(running_module, "_PREVIEW_CHARACTERS_KEPT", 25)
    job = new_job()
    reading = asyncio.create_task(collect(job))
    for step in range(1, 6):
        job.publish(event("step", step).model_copy(update={"preview": "x" * 10}))
        await asyncio.sleep(0)  # who keeps up misses nothing
    kept = [seen.step for seen in job._events if seen.preview]
    assert kept == [4, 5]
    job.publish(event("failed"))
    assert [bool(seen.preview) for seen in await reading] == [True] * 5 + [False]
    late = await collect(job)
    assert [seen.step for seen in late] == [1, 2, 3, 4, 5, None]
    assert not any(seen.preview for seen in late)


async def test_time_left_is_given_to_the_work_and_no_more(monkeypatch: pytest.MonkeyPatch):
    async def never() -> None:
        await asyncio.Event().wait()

    async def quick() -> str:
        return "done"

    assert new_job().seconds_left is None
    assert await new_job().in_time(quick()) == "done"
    late = RunningJob("1", GenerateRequest(prompt="a", deadline_s=7.0))
    assert 0 < (late.seconds_left or 0) <= 7
    late.accepted_at -= 8
    assert late.seconds_left == 0
    with pytest.raises(DeadlineExceeded) as caught:
        await late.in_time(never())
    assert caught.value.value == 7.0


async def test_a_follower_who_leaves_disturbs_nobody():
    job = new_job()
    leaving = asyncio.create_task(collect(job))
    staying = asyncio.create_task(collect(job))
    job.publish(event("queued"))
    await asyncio.sleep(0)
    leaving.cancel()
    job.publish(event("failed"))
    assert [seen.event for seen in await staying] == ["queued", "failed"]


async def test_the_result_waits_and_raises_as_the_job_failed():
    job = new_job()
    waiting = asyncio.create_task(job.result())
    await asyncio.sleep(0)
    assert not waiting.done()
    job.error = StageFailed("boom")
    job.publish(event("failed"))
    with pytest.raises(StageFailed, match="boom"):
        await waiting


@pytest.mark.parametrize("turns", range(5))
async def test_cancelling_stops_the_work_at_any_time_and_never_the_ending(turns: int):
    job = new_job()
    ended: list[str] = []

    async def work() -> None:
        await asyncio.Event().wait()

    async def life() -> None:
        await asyncio.sleep(0)
        try:
            await job.work(work())
        except asyncio.CancelledError:
            job.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ended.append("yes")
        job.publish(event("cancelled"))

    job.start(life())
    for _ in range(turns):
        await asyncio.sleep(0)
    job.cancel()
    job.cancel()
    assert [one.event for one in await collect(job)] == ["cancelled"]
    assert ended == ["yes"]
    job.cancel()
