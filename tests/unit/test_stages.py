"""Calls to the stages: retried where a replica died, typed otherwise, cancelled to the end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray import exceptions as ray_exceptions
from ray.serve.exceptions import BackPressureError

from cluster.pool_state import ReplicaState, Stage
from cluster.work_sizes import Asked
from deployments.payloads import (
    DenoiseJob,
    Latents,
    Pixels,
    PromptEmbedding,
    Stamp,
    StepProgress,
)
from serve import first_answer as first_answer_module
from serve import stages as stages_module
from serve.errors import InvalidRequest, Overloaded, StageFailed, StageUnavailable
from serve.stages import Stages

STAMP = Stamp("r", 1, "fp32", 0.0, 0.1)
LATENTS = Latents(np.zeros((16, 2, 2), np.float32), STAMP)
PIXELS = Pixels(np.zeros((16, 16, 3), np.uint8), STAMP)
PROMPT = PromptEmbedding(np.zeros((2, 2), np.float32), np.zeros(2, np.float32), (), STAMP)
JOB = DenoiseJob("1", 0, 16, 16, 2, 1.0, "euler", "normal", 3.0, 0, PROMPT, None)
DEAD = ray_exceptions.ActorDiedError()
Outcome = Any


class FakeResponse:
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.is_cancelled = False
        self.wakes = asyncio.Event()

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        if self.outcome is None:
            await self.wakes.wait()
        return self.outcome

    async def __aiter__(self) -> Any:
        if hasattr(self.outcome, "__aiter__"):
            async for item in self.outcome:
                yield item
            return
        for item in self.outcome:
            if isinstance(item, BaseException):
                raise item
            if item is None:
                await asyncio.Event().wait()
            yield item

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeHandle:
    """Answers call after call from a list, whatever the method."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)
        self.responses: list[FakeResponse] = []
        self.sent: list[Any] = []

    def options(self, **_: Any) -> FakeHandle:
        return self

    def __getattr__(self, method: str) -> FakeHandle:
        return self

    def remote(self, *payload: Any) -> FakeResponse:
        self.sent.extend(payload)
        self.responses.append(FakeResponse(self.outcomes.pop(0)))
        return self.responses[-1]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_module, "_PAUSE_BEFORE_RETRY_S", 0.0)


class FakeChoice:
    """Takes the pools in turn and remembers what it was told."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.asleep: set[Stage] = set()
        self.vain: set[str] = set()
        self.told: list[tuple[str, ReplicaState]] = []
        self.pictures: list[tuple[str, DenoiseJob, Latents]] = []
        self.calls: list[tuple[str, Asked, float]] = []

    @contextmanager
    def sending(self, stage: Stage, payload: Any, job: DenoiseJob | None = None) -> Iterator[str]:
        yield self.pool(stage)

    def pool(self, stage: Stage, job: DenoiseJob | None = None) -> str:
        return self.names.pop(0) if self.names else "only"

    def is_vain(self, pool: str, waited_s: float) -> bool:
        return pool in self.vain

    def is_asleep(self, stage: Stage) -> bool:
        return stage in self.asleep

    def estimated_s(self, job: DenoiseJob) -> float:
        return 1.0

    def heard(self, pool: str, load: ReplicaState | None) -> None:
        if load is not None:
            self.told.append((pool, load))

    def learnt(self, pool: str, job: DenoiseJob, latents: Latents) -> None:
        self.pictures.append((pool, job, latents))

    def took(self, pool: str, kind: Asked, seconds: float) -> None:
        self.calls.append((pool, kind, seconds))


def stages(retries: int = 2, **handles: Any) -> Stages:
    names: dict[Stage, str] = {
        "text": "text_encoder",
        "denoise": "denoiser",
        "decode": "vae_decoder",
    }
    pools = {stage: {"only": handles.get(name, FakeHandle())} for stage, name in names.items()}
    return Stages(pools, FakeChoice(), retries=retries)


async def test_a_death_is_retried():
    decoder = FakeHandle(DEAD, ray_exceptions.ActorUnavailableError("x", None), PIXELS)
    assert await stages(vae_decoder=decoder).decode(LATENTS) is PIXELS
    assert decoder.outcomes == []


async def test_a_call_cancelled_on_the_other_side_is_retried():
    # Ray's handles raise this when the replica's task was cancelled; nobody here asked for it.
    decoder = FakeHandle(asyncio.CancelledError(), PIXELS)
    assert await stages(vae_decoder=decoder).decode(LATENTS) is PIXELS
    denoiser = FakeHandle([asyncio.CancelledError()], [(LATENTS,)])
    assert await stages(denoiser=denoiser).denoise(JOB, print) is LATENTS
    never = FakeHandle(*[asyncio.CancelledError()] * 3)
    with pytest.raises(StageUnavailable, match="decode"):
        await stages(vae_decoder=never).decode(LATENTS)


async def test_deaths_without_end_are_typed():
    decoder = FakeHandle(*[DEAD] * 9)
    with pytest.raises(StageUnavailable, match="decode"):
        await stages(vae_decoder=decoder, retries=3).decode(LATENTS)
    assert len(decoder.responses) == 4


def task_error(cause: Exception) -> Exception:
    error: Exception = ray_exceptions.RayTaskError("f", "traceback", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (task_error(InvalidRequest("no", field="shift")), InvalidRequest),
        (task_error(task_error(InvalidRequest("no", field="shift"))), InvalidRequest),
        (task_error(ValueError("boom\nand more")), StageFailed),
        (task_error(OSError(2, "boom", "/opt/models/large/vae/x.safetensors")), StageFailed),
        (task_error(BackPressureError(3, 2)), Overloaded),
        (BackPressureError(3, 2), Overloaded),
        (RuntimeError("boom"), StageFailed),
    ],
)
async def test_what_a_retry_cannot_help_is_raised_at_once(
    raised: Exception, expected: type[Exception]
):
    decoder = FakeHandle(raised, PIXELS)
    with pytest.raises(expected) as caught:
        await stages(vae_decoder=decoder).decode(LATENTS)
    assert type(caught.value) is expected, "not Ray's wrapper of it"
    assert "/opt" not in str(caught.value), "nor where the server keeps its files"
    assert len(decoder.responses) == 1


async def test_a_bare_death_inside_a_stage_is_a_death():
    decoder = FakeHandle(task_error(DEAD), PIXELS)
    assert await stages(vae_decoder=decoder).decode(LATENTS) is PIXELS


async def test_the_denoiser_starts_again_on_another_replica():
    first = [(StepProgress(1, 2, 0.1),), DEAD]
    second = [(StepProgress(1, 2, 0.1), StepProgress(2, 2, 0.1), LATENTS)]
    denoiser = FakeHandle(first, second)
    seen: list[int] = []
    made = await stages(denoiser=denoiser).denoise(JOB, lambda progress: seen.append(progress.step))
    assert made == replace(LATENTS, moves=1, steps_repeated=1)
    assert seen == [1, 1, 2]
    assert denoiser.responses[0].is_cancelled


async def test_a_stream_without_latents_is_not_taken_for_a_picture():
    denoiser = FakeHandle([(StepProgress(1, 2, 0.1),)], [(LATENTS,)])
    made = await stages(denoiser=denoiser).denoise(JOB, lambda _: None)
    assert made.latents is LATENTS.latents


async def test_who_starts_again_has_less_time(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(stages_module, "monotonic", lambda: clock[0])

    async def dies_after(seconds: float) -> Any:
        clock[0] += seconds
        raise DEAD
        yield

    denoiser = FakeHandle(dies_after(2.5), dies_after(9.0), [(LATENTS,)])
    job = replace(JOB, deadline_s=10.0)
    assert await stages(denoiser=denoiser).denoise(job, print) is LATENTS
    assert [sent.deadline_s for sent in denoiser.sent] == [10.0, 7.5, 0.0]


@pytest.mark.parametrize(
    ("name", "outcome", "call"),
    [
        ("text_encoder", None, lambda made: made.encode(())),
        ("vae_decoder", None, lambda made: made.decode(LATENTS)),
        ("denoiser", [None], lambda made: made.denoise(JOB, lambda _: None)),
    ],
)
async def test_cancelling_reaches_the_replica(
    name: str, outcome: Outcome, call: Callable[[Stages], Any]
):
    handle = FakeHandle(outcome)
    task = asyncio.create_task(call(stages(2, **{name: handle})))
    while not handle.responses:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.responses[0].is_cancelled


async def test_work_goes_to_the_chosen_pool_and_each_try_chooses_again():
    fast = FakeHandle([(StepProgress(1, 2, 0.1),), DEAD])
    slow = FakeHandle([(StepProgress(1, 2, 0.1), LATENTS)])
    choice = FakeChoice("fast", "slow")
    pools = {"text": {}, "denoise": {"fast": fast, "slow": slow}, "decode": {}}
    made = Stages(pools, choice, retries=1)  # type: ignore[arg-type]
    assert (await made.denoise(JOB, lambda _: None)).latents is LATENTS.latents
    assert len(fast.responses) == len(slow.responses) == 1
    assert choice.pictures == [("slow", JOB, LATENTS)]


async def test_what_replicas_tell_of_themselves_is_passed_on():
    load = ReplicaState("r", waiting_s=3.0)
    steps = [(replace(StepProgress(1, 2, 0.1), load=load), replace(LATENTS, load=load))]
    choice = FakeChoice()
    pools: Any = {
        "text": {"only": FakeHandle((replace(PROMPT, load=load), PROMPT))},
        "denoise": {"only": FakeHandle(steps)},
        "decode": {"only": FakeHandle(replace(PIXELS, load=load))},
    }
    made = Stages(pools, choice, retries=0)
    await made.encode(())
    await made.denoise(JOB, lambda _: None)
    await made.decode(LATENTS)
    assert choice.told == [("only", load)] * 4


async def test_a_call_does_not_wait_in_vain_where_another_pool_has_replicas(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(first_answer_module, "_LOOK_AGAIN_S", 0.01)
    never, other = FakeHandle([None]), FakeHandle([(StepProgress(1, 2, 0.1), LATENTS)])
    choice = FakeChoice("never", "other")
    choice.vain = {"never"}
    pools = {"text": {}, "denoise": {"never": never, "other": other}, "decode": {}}
    made = Stages(pools, choice, retries=1)  # type: ignore[arg-type]
    assert await made.denoise(JOB, lambda _: None) is LATENTS
    assert never.responses[0].is_cancelled


@pytest.mark.parametrize("stage", ["text", "decode"])
async def test_nor_does_one_of_the_other_stages(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(first_answer_module, "_LOOK_AGAIN_S", 0.01)
    never, other = FakeHandle(None), FakeHandle((PROMPT,) if stage == "text" else PIXELS)
    choice = FakeChoice("never", "other")
    choice.vain = {"never"}
    pools: Any = {"text": {}, "denoise": {}, "decode": {}}
    pools[stage] = {"never": never, "other": other}
    made = Stages(pools, choice, retries=1)
    if stage == "text":
        assert await made.encode(()) == (PROMPT,)
    else:
        assert await made.decode(LATENTS) is PIXELS
    assert never.responses[0].is_cancelled


async def test_the_first_stage_wakes_those_behind_it_once():
    asleep, awake = FakeHandle(None), FakeHandle()
    choice = FakeChoice()
    choice.asleep = {"denoise"}
    text = FakeHandle((PROMPT,), (PROMPT,))
    pools: Any = {
        "text": {"only": text},
        "denoise": {"only": asleep},
        "decode": {"only": awake},
    }
    made = Stages(pools, choice, retries=0)
    for _ in range(2):
        await made.encode(())
        await asyncio.sleep(0)
    assert (len(asleep.responses), len(awake.responses)) == (1, 0)
    asleep.responses[0].wakes.set()
    for _ in range(5):
        await asyncio.sleep(0)
    # It has come and gone again.
    text.outcomes.append((PROMPT,))
    asleep.outcomes.append({})
    await made.encode(())
    await asyncio.sleep(0)
    assert len(asleep.responses) == 2


async def test_how_a_call_ends_that_was_given_up_is_nobodys_error():
    class GivenUp:
        """As Ray's handles: a cancellation becomes an error of their own."""

        def __await__(self) -> Any:
            return self._answer().__await__()

        async def _answer(self) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise RuntimeError("the request was cancelled") from None

        def cancel(self) -> None:
            pass

    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    waiting = asyncio.create_task(first_answer_module.answer_of(GivenUp(), lambda _: False))
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    assert told == []
