"""What is accepted with a deadline can be done by then; the rest is told at once, and when."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.pool_state import ReplicaState
from cluster.process_boards import PoolBoard, board_of
from deployments.payloads import StepProgress
from serve.config import PipelineSettings, PoolSettings, StorageSettings
from serve.errors import DeadlineExceeded, Overloaded
from serve.http.native import build_app
from serve.pipeline import Pipeline
from serve.requests import GenerateRequest
from tests.inprocess.stand_in_stages import LATENTS, StandIn, new_pipeline

_numbers = itertools.count()
STEPS = 10
PICTURE_S = 2.0
STAGES = {"text_encoder": "text", "denoiser": "denoiser", "vae_decoder": "decoder"}


class World:
    """A Pipeline that has seen a picture take two seconds, on pools that no other test uses."""

    def __init__(
        self, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch, **sections: Any
    ) -> None:
        self.stages = StandIn()
        self.stages.steps = [StepProgress(step, STEPS, 0.1) for step in (1, STEPS)]
        self.stages.latents = [replace(LATENTS, cool_s=PICTURE_S)]
        number = next(_numbers)
        self.name = f"denoiser-{number}"
        pools: dict[str, Any] = {
            stage: (PoolSettings(name=f"{name}-{number}", kind_speed=1.0),)
            for stage, name in STAGES.items()
        }
        self.pipeline = new_pipeline(self.stages, storage, monkeypatch, **pools, **sections)
        # A test may take its time, and nothing is done meanwhile: that is no standstill.
        self.now = 50.0
        self.pipeline._jobs._forecaster._clock = lambda: self.now

    @property
    def board(self) -> PoolBoard:
        return board_of(self.name)

    async def seen_one(self) -> World:
        await self.pipeline.generate(request())
        return self

    async def flood(self, pictures: int) -> list[str]:
        self.stages.gate.clear()
        return [(await self.pipeline.submit(request())).id for _ in range(pictures)]

    async def end(self) -> None:
        self.stages.gate.set()
        await self.until_running(0)

    async def until_running(self, number: int) -> None:
        async with asyncio.timeout(20):
            while (await self.pipeline.status())["pipeline"]["running_jobs"] != number:
                await asyncio.sleep(0.01)


def request(**fields: Any) -> GenerateRequest:
    asked: dict[str, Any] = {"prompt": "a", "seed": 5, "num_inference_steps": STEPS}
    return GenerateRequest(**(asked | fields))


@asynccontextmanager
async def door(pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield http


async def post(http: httpx.AsyncClient, deadline_s: float | None = None) -> httpx.Response:
    return await http.post(
        "/v1/jobs", json={"prompt": "a", "num_inference_steps": STEPS, "deadline_s": deadline_s}
    )


async def test_a_request_behind_too_much_work_is_told_when_to_come_again(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    await world.flood(10)
    async with door(world.pipeline) as http:
        refused = await post(http, deadline_s=15.0)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.json()["error"]["field"] == "deadline_s"
        wait_s = int(refused.headers["retry-after"])
        # Ten pictures of two seconds and its own: some five seconds too much, and a margin.
        assert 3 <= wait_s <= 20
        assert (await post(http, deadline_s=1000.0)).status_code == 202
        assert (await post(http)).status_code == 202
        await world.end()
        assert (await post(http, deadline_s=15.0)).status_code == 202
    await world.end()


async def test_who_comes_again_when_told_goes_before_others(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    jobs = await world.flood(4)
    mine, theirs = (request(deadline_s=15.0, prompt=prompt) for prompt in ("mine", "theirs"))
    with pytest.raises(Overloaded) as refused:
        await world.pipeline.submit(mine)
    await world.pipeline.cancel(jobs[0])
    await world.until_running(3)
    with pytest.raises(Overloaded):
        await world.pipeline.submit(theirs)
    with pytest.raises(Overloaded) as early:
        await world.pipeline.submit(mine)
    assert early.value.retry_after_s == refused.value.retry_after_s
    world.now += refused.value.retry_after_s or 0.0
    with pytest.raises(Overloaded):
        await world.pipeline.submit(request(deadline_s=15.0, prompt="another"))
    await world.pipeline.submit(mine)
    await world.end()


async def test_a_deadline_that_nobody_could_meet_is_told_at_once_and_nothing_is_written(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    with pytest.raises(DeadlineExceeded) as caught:
        await world.pipeline.submit(request(deadline_s=1.0))
    assert (caught.value.field, caught.value.value) == ("deadline_s", 1.0)
    # Sixteen may share forwards; they take longer than one all the same.
    with pytest.raises(DeadlineExceeded):
        await world.pipeline.submit(request(deadline_s=8.0, num_images=16))
    # A size never seen is guessed from the others.
    with pytest.raises(DeadlineExceeded):
        await world.pipeline.submit(request(deadline_s=4.0, width=64, height=64))
    assert not await world.pipeline._journal.pending()
    assert (await world.pipeline.status())["pipeline"]["running_jobs"] == 0


async def test_an_idle_service_takes_what_it_can_do_however_slow_it_was(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    slow = await world.pipeline.submit(request(deadline_s=600.0))
    world.pipeline._live[slow.id].accepted_at -= 500.0
    await world.end()
    await world.pipeline.generate(request(deadline_s=5.0))


async def test_without_a_deadline_or_without_experience_only_room_counts(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = World(storage, monkeypatch)
    await world.flood(20)
    await world.pipeline.submit(request(deadline_s=0.5))
    await world.end()


async def test_what_others_have_brought_counts_as_replicas_tell(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = World(storage, monkeypatch, pipeline=PipelineSettings(num_replicas=2))
    await world.seen_one()
    world.board.keep(["r"])
    await world.flood(1)
    await world.pipeline.submit(request(deadline_s=12.0))
    # Nothing is in flight there from here: what the replica holds is somebody else's.
    world.board.heard(ReplicaState("r", waiting_s=20.0, requests=10))
    with pytest.raises(Overloaded):
        await world.pipeline.submit(request(deadline_s=12.0))
    await world.end()


async def test_a_stage_without_replicas_is_no_overload(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    world.board.keep(["r"])
    world.board.keep([])
    async with door(world.pipeline) as http:
        refused = await post(http, deadline_s=15.0)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stage_unavailable")
        assert int(refused.headers["retry-after"]) == 60
        assert (await post(http, deadline_s=600.0)).status_code == 202
    world.board.keep(["r"])
    await world.end()


async def test_a_tenant_leaves_time_for_another(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    world.stages.gate.clear()

    async def accepted(tenant: str) -> int:
        for number in range(40):
            try:
                await world.pipeline.submit(request(deadline_s=60.0), tenant)
            except Overloaded:
                return number
        return 40

    first, second = await accepted("acme"), await accepted("globex")
    assert 3 <= second <= first <= 15, "thirty would do for one alone"
    await world.end()


async def test_the_same_key_twice_is_the_same_job_though_time_is_short(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch
):
    world = await World(storage, monkeypatch).seen_one()
    keyed = request(deadline_s=20.0, idempotency_key="k")
    first = await world.pipeline.submit(keyed)
    await world.flood(10)
    assert (await world.pipeline.submit(keyed)).id == first.id
    with pytest.raises(Overloaded):
        await world.pipeline.submit(request(deadline_s=20.0, idempotency_key="other"))
    await world.end()
    # Refused, it was no job; its key is as good as new.
    assert (await world.pipeline.submit(request(deadline_s=20.0, idempotency_key="other"))).id
    await world.end()
