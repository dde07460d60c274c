"""The denoise stage's own class with `pico`: one that goes, and one that goes on."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments import denoiser as denoiser_module
from deployments.builtin.pico import write_pico
from deployments.denoiser import Denoiser
from deployments.payloads import (
    DenoiseEvent,
    DenoiseJob,
    Handover,
    Latents,
    LoraUse,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.sd3.text import TextEncoders
from serve.checkpoints.lora_file import BaseModel
from serve.config import ModelSettings, PoolSettings
from serve.lora_choice import LoraChoice
from serve.lora_settings import LoraSettings
from serve.loras import LoraLibrary
from serve.requests import GenerateRequest
from tests.unit.lora_files import random_lora, written

NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
# So many that it is not done before it is asked to go.
STEPS = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = write_pico(tmp_path_factory.mktemp("moving") / "pico", seed=0)
    adapter = random_lora(BaseModel.of_folder(folder), 4, 1, "transformer")
    written(folder / "loras" / "style.safetensors", adapter)
    return ModelSettings(path=str(folder))


def job(model: ModelSettings, loras: tuple[LoraUse, ...]) -> DenoiseJob:
    encoders = TextEncoders.load(Path(model.path), "cpu", "fp32")
    texts = ("a red circle", "blue")
    encoded = encoders.encode([TextJob(text, text, text, 16) for text in texts])
    positive, negative = (
        PromptEmbedding(each.prompt_embeds, each.pooled_prompt_embeds, (), NOBODY)
        for each in encoded
    )
    return DenoiseJob(
        job_id="moves",
        image=0,
        width=128,
        height=128,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        sampler="dpmpp_2m_sde",
        scheduler="normal",
        shift=3.0,
        seed=7,
        positive=positive,
        negative=negative,
        loras=loras,
    )


async def told(denoiser: Denoiser, job: DenoiseJob, leave: threading.Event) -> list[DenoiseEvent]:
    """Return all that a denoiser says; it is asked to go once it has said something."""
    events: list[DenoiseEvent] = []
    async for item in denoiser.denoise(job):
        events += item
        leave.set()
    return events


async def test_a_picture_with_a_lora_goes_on_in_another_denoiser(
    model: ModelSettings, monkeypatch: pytest.MonkeyPatch
):
    pool = PoolSettings(name="denoiser", torch_threads=1, precision="fp32")
    loras = LoraLibrary(model, LoraSettings()).uses(
        GenerateRequest(prompt="a", loras=(LoraChoice(name="style"),))
    )
    asked = job(model, loras.denoise)
    leaving, nothing = threading.Event(), threading.Event()
    with monkeypatch.context() as serve_says:
        serve_says.setattr(denoiser_module, "stop_signal", lambda: leaving.is_set)
        first = Denoiser(model, pool)
    second = Denoiser(model, pool)
    *steps, last = await told(first, asked, leaving)
    assert isinstance(last, Handover)
    assert last.checkpoint is not None
    assert [each.step for each in steps if isinstance(each, StepProgress)] == list(
        range(1, last.checkpoint.step + 1)
    )
    (at_once,) = await told(first, replace(asked, resume=last.checkpoint), nothing)
    assert at_once == last, "it takes nothing more"
    first.check_health()
    *steps, resumed = await told(second, replace(asked, resume=last.checkpoint), nothing)
    assert [each.step for each in steps if isinstance(each, StepProgress)] == list(
        range(last.checkpoint.step + 1, STEPS + 1)
    )
    *_, undisturbed = await told(second, asked, nothing)
    assert isinstance(resumed, Latents)
    assert isinstance(undisturbed, Latents)
    np.testing.assert_array_equal(resumed.latents, undisturbed.latents)
