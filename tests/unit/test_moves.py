"""A picture whose denoiser dies or goes is sent on with its last checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deployments.payloads import (
    Checkpoint,
    DenoiseEvent,
    DenoiseJob,
    Handover,
    Latents,
    PromptEmbedding,
    Stamp,
    StepProgress,
)
from serve import stages as stages_module
from serve.errors import StageFailed, StageUnavailable
from serve.move_errors import CheckpointRefused
from serve.stage_reports import denoise_report
from serve.stages import Stages
from tests.unit.test_stages import DEAD, FakeChoice, FakeHandle

ARRAY = np.zeros((16, 2, 2), np.float32)
STAMP = Stamp("r", 1, "fp32", 0.0, 0.1)
LATENTS = Latents(ARRAY, STAMP, joules=3.0, cool_s=1.5)
PROMPT = PromptEmbedding(ARRAY[0], ARRAY[0, 0], (), STAMP)
JOB = DenoiseJob("1", 0, 16, 16, 20, 1.0, "euler", "normal", 3.0, 0, PROMPT, None)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_module, "_PAUSE_BEFORE_RETRY_S", 0.0)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(1, step, 20, "euler", "normal", 3.0, 0, ARRAY, None, np.zeros(1, np.uint8))


def steps(first: int, last: int, every: int = 5) -> list[tuple[DenoiseEvent, ...]]:
    """A stream as a denoiser sends it: each checkpoint one step late."""
    taken = {n: checkpoint(n) for n in range(every, 20, every)}
    numbers = range(first, last + 1)
    return [(StepProgress(n, 20, 0.1, checkpoint=taken.get(n - 1)),) for n in numbers]


class Denoisers:
    """Outcomes of one call after the other, and what was sent and told."""

    def __init__(self, *outcomes: Any, retries: int = 2) -> None:
        self.handle = FakeHandle(*outcomes)
        self.choice = FakeChoice()
        pools: Any = {stage: {"only": self.handle} for stage in ("text", "denoise", "decode")}
        self.stages = Stages(pools, self.choice, retries=retries)
        self.told: list[StepProgress] = []

    async def denoise(self, job: DenoiseJob = JOB) -> Latents:
        return await self.stages.denoise(job, self.told.append)

    @property
    def resumed_at(self) -> list[int | None]:
        return [None if each.resume is None else each.resume.step for each in self.handle.sent]


async def test_after_a_death_it_goes_on_from_the_last_checkpoint():
    denoisers = Denoisers([*steps(1, 15), DEAD], [*steps(11, 20), (LATENTS,)])
    latents = await denoisers.denoise()
    assert denoisers.resumed_at == [None, 10]
    assert (latents.moves, latents.steps_repeated) == (1, 5)
    assert latents.joules is None, "what the first replica used is not known"
    assert [each.step for each in denoisers.told] == [*range(1, 16), *range(11, 21)]
    assert all(each.checkpoint is None for each in denoisers.told)
    told = denoise_report(latents, set(), 0)
    assert (told.moves, told.steps_repeated) == (1, 5)
    ((_, learnt, at_cost),) = denoisers.choice.pictures
    assert (learnt.steps_left, at_cost.cool_s) == (10, 1.5), "learnt by the steps that it took"
    assert latents.cool_s == 3.0, "a tenant's seconds are those of all steps once"


async def test_who_goes_hands_over_and_no_step_is_repeated_and_no_try_is_used_up():
    leaving = [[*steps(1, 7), (Handover(checkpoint(7)),)], *[[(Handover(checkpoint(7)),)]] * 5]
    denoisers = Denoisers(*leaving, [*steps(8, 20), (LATENTS,)], retries=0)
    latents = await denoisers.denoise()
    assert denoisers.resumed_at == [None] + 6 * [7]
    assert (latents.moves, latents.steps_repeated) == (1, 0)
    assert [each.step for each in denoisers.told] == [*range(1, 21)]


async def test_who_goes_before_the_first_step_moves_nothing():
    latents = await Denoisers([(Handover(None),)], [*steps(1, 20), (LATENTS,)]).denoise()
    assert (latents.moves, latents.steps_repeated, latents.joules) == (0, 0, 3.0)


async def test_deaths_use_up_tries_wherever_it_goes_on():
    denoisers = Denoisers([*steps(1, 7), DEAD], [*steps(6, 12), DEAD], retries=1)
    with pytest.raises(StageUnavailable):
        await denoisers.denoise()
    assert denoisers.resumed_at == [None, 5]


async def test_a_checkpoint_that_is_refused_is_forgotten():
    refusal = CheckpointRefused("It does not fit.", allowed="another")
    denoisers = Denoisers([*steps(1, 7), DEAD], [refusal], [*steps(1, 20), (LATENTS,)])
    latents = await denoisers.denoise()
    assert denoisers.resumed_at == [None, 5, None]
    assert latents.moves == 1
    assert latents.steps_repeated == 7
    assert latents.joules == 3.0, "the last replica did all of it"


async def test_what_fails_by_itself_goes_nowhere():
    denoisers = Denoisers([*steps(1, 7), StageFailed("NaN")])
    with pytest.raises(StageFailed):
        await denoisers.denoise()
    assert denoisers.resumed_at == [None]
