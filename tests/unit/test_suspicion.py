"""Whose fault it is that a replica died; and turns of those who must be alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import exceptions as ray_exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from deployments.turns import Turns
from serve import stages as stages_module
from serve.errors import StageFailed
from serve.stage_errors import is_crash
from serve.suspicion import Suspicion
from tests.unit.test_stages import JOB, LATENTS, PIXELS, FakeHandle, stages

_WORDS = "The actor is dead because its worker process has died. Worker exit type: "


def died(why: str) -> ray_exceptions.ActorDiedError:
    context = ActorDiedErrorContext(actor_id=b"0" * 16, error_message=why)
    return ray_exceptions.ActorDiedError(context)


CRASH = died(f"{_WORDS}SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits.")
INNOCENT = [
    died("The actor died because its node has died. Node Id: 0123"),
    died("The actor is dead because it was killed by `ray.kill`."),
    died(f"{_WORDS}INTENDED_SYSTEM_EXIT Worker exit detail: Worker exits by a signal."),
    ray_exceptions.ActorUnavailableError("x", None),
]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_module, "_PAUSE_BEFORE_RETRY_S", 0.0)


def test_what_counts_as_a_crash():
    assert is_crash(CRASH)
    told_of = ray_exceptions.RayTaskError("f", "", ray_exceptions.ActorDiedError())
    assert not is_crash(told_of.as_instanceof_cause())
    assert not any(map(is_crash, [*INNOCENT, ValueError("SYSTEM_ERROR")]))


async def test_a_suspect_is_run_alone_and_parked_after_two_more_deaths():
    decoder = FakeHandle(CRASH, CRASH, CRASH, PIXELS)
    asked: list[dict[str, Any]] = []
    remote = decoder.remote

    def remembered(*payload: Any, **options: Any) -> Any:
        asked.append(options)
        return remote(*payload)

    decoder.remote = remembered  # type: ignore[method-assign]
    with pytest.raises(StageFailed, match="died 2 times while it worked on this alone"):
        await stages(vae_decoder=decoder, retries=0).decode(LATENTS)
    assert asked == [{}, {"alone": True}, {"alone": True}]


async def test_a_picture_is_not_to_blame_before_it_was_alone():
    # It waits to be alone while others in the replica kill it, five times; its own turn comes last.
    waits = [[CRASH]] * 5
    denoiser = FakeHandle(*waits, [(), CRASH], [(), (LATENTS,)])
    assert await stages(denoiser=denoiser, retries=0).denoise(JOB, print) is LATENTS
    assert [job.alone for job in denoiser.sent] == [False] + [True] * 6
    poison = FakeHandle([CRASH], [(), CRASH], [CRASH], [(), CRASH], [(LATENTS,)])
    with pytest.raises(StageFailed):
        await stages(denoiser=poison, retries=0).denoise(JOB, print)
    assert len(poison.responses) == 4


@pytest.mark.parametrize("loss", INNOCENT, ids=lambda error: type(error).__name__)
async def test_drains_and_lost_nodes_say_nothing_of_the_work(loss: Exception):
    denoiser = FakeHandle([loss], [loss], [(LATENTS,)])
    assert await stages(denoiser=denoiser, retries=2).denoise(JOB, print) is LATENTS
    assert not any(job.alone for job in denoiser.sent)


@given(st.lists(st.sampled_from(["began", "left", "crashed"]), max_size=30))
def test_only_deaths_alone_prove_anything(story: list[str]):
    suspicion = Suspicion("denoise")
    alone = began = False
    deaths = 0
    for event in story:
        if event == "began":
            suspicion.began()
            began = True
        elif event == "left":
            suspicion.left()
            began = False
        else:
            deaths += began and alone
            proven = suspicion.replica_crashed()
            assert (proven is not None) == (deaths >= 2)
            began, alone = False, True
        assert suspicion.is_suspect == alone


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.booleans()), max_size=20))
async def test_who_is_alone_is_alone_and_everybody_gets_a_turn(
    workers: list[tuple[bool, int, bool]],
):
    turns = Turns()
    inside: list[bool] = []

    async def work(alone: bool, steps: int) -> None:
        async with turns.turn(alone=alone):
            inside.append(alone)
            try:
                for _ in range(steps):
                    assert not any(inside) or len(inside) == 1
                    await asyncio.sleep(0)
            finally:
                inside.remove(alone)

    tasks = []
    for alone, steps, is_cancelled in workers:
        tasks.append(asyncio.create_task(work(alone, steps)))
        await asyncio.sleep(0)
        if is_cancelled:
            tasks[-1].cancel()
    ends = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
    assert not any(isinstance(end, AssertionError) for end in ends)
    async with turns.turn(alone=True):
        assert not inside


async def test_who_gives_up_waiting_to_be_alone_keeps_nobody_out():
    turns = Turns()
    async with turns.turn(alone=False):

        async def alone() -> None:
            async with turns.turn(alone=True):
                raise AssertionError("somebody works")

        waiting = asyncio.create_task(alone())
        await asyncio.sleep(0)
        late = asyncio.create_task(_together(turns))
        await asyncio.sleep(0)
        assert not late.done(), "who waits to be alone goes before those who come later"
        waiting.cancel()
        await asyncio.wait_for(late, 5)


async def _together(turns: Turns) -> None:
    async with turns.turn(alone=False):
        return
