"""Previews look like the picture that they become: on the built-in model, from noise to the end."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deployments import builtin
from deployments.engine import Engine
from deployments.payloads import DenoiseJob, Latents, PromptEmbedding, Stamp, StepProgress, TextJob
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.previews import SD3, LatentRgb, latents_to_rgb
from deployments.sd3.text import TextEncoders
from deployments.sd3.vae import VaeDecoder

WEIGHTS = Path(builtin.__path__[0]) / "weights"
SIDE, STEPS = 192, 12
PROMPTS = ("a large red circle on a white background", "two blue squares above a green star")


def shrunk(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    height, width, _ = picture.shape
    squares = picture.reshape(height // 8, 8, width // 8, 8, 3)
    return np.asarray(squares.mean(axis=(1, 3)), np.float64)


def likeness(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Correlation of all colour values; 1 is the same picture."""
    return float(np.corrcoef(one.ravel().astype(float), other.ravel().astype(float))[0, 1])


@pytest.fixture(scope="module")
def made() -> list[tuple[list[StepProgress], Latents, NDArray[np.uint8]]]:
    """For each prompt the progress, the latents and the decoded picture."""
    text = TextEncoders.load(WEIGHTS, "cpu", "fp32")
    decoder = VaeDecoder.load(WEIGHTS, "cpu", "fp32")
    stamp = Stamp("r", 1, "fp32", 0.0, 0.0)
    encoded = [
        PromptEmbedding(each.prompt_embeds, each.pooled_prompt_embeds, (), stamp)
        for each in text.encode([TextJob(one, one, one, 48) for one in (*PROMPTS, "")])
    ]
    mmdit = Mmdit.load(WEIGHTS, torch.device("cpu"), "fp32")
    engine = Engine(mmdit, max_waiting=4, latent_rgb=LatentRgb.of_model(WEIGHTS))
    pictures = []
    try:
        for seed, positive in enumerate(encoded[:-1]):
            events: queue.Queue[Any] = queue.Queue()
            job = DenoiseJob(
                "1", 0, SIDE, SIDE, STEPS, 4.0, "euler", "normal", 3.0, seed, positive,
                encoded[-1], preview_every=3,
            )  # fmt: skip
            engine.submit(job, events.put)
            told = [events.get(timeout=120) for _ in range(STEPS + 1)]
            *progress, latents = told
            pictures.append((progress, latents, decoder.decode(latents.latents)))
    finally:
        engine.close()
    return pictures


def test_the_last_preview_is_the_picture_in_small(made):
    smalls = [shrunk(picture) for _, _, picture in made]
    mapping = LatentRgb.of_model(WEIGHTS)
    previews = [
        latents_to_rgb(torch.from_numpy(latents.latents), mapping) for _, latents, _ in made
    ]
    for index, (small, preview) in enumerate(zip(smalls, previews, strict=True)):
        assert preview.shape == (SIDE // 8, SIDE // 8, 3)
        assert likeness(preview, small) > 0.9
        assert np.abs(preview - small).mean() < 24
        # The check can fail: another picture's preview, and red taken for blue, do.
        assert likeness(previews[1 - index], small) < 0.8
        assert likeness(preview[..., ::-1], small) < 0.8


def test_previews_come_every_third_step_but_the_last_and_foretell_the_picture(made):
    for progress, _, picture in made:
        previews = {one.step: one.preview for one in progress if one.preview is not None}
        assert list(previews) == [3, 6, 9]
        # Half way the latents are still mostly noise; what is shown is what they are becoming.
        assert likeness(previews[6], shrunk(picture)) > 0.8
        assert likeness(previews[9], shrunk(picture)) > likeness(previews[3], shrunk(picture))


def test_another_vaes_map_shows_other_colours(made):
    for _, latents, picture in made:
        wrong = latents_to_rgb(torch.from_numpy(latents.latents), SD3)
        assert likeness(wrong, shrunk(picture)) < 0.8
