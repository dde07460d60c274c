"""Our chain against diffusers' own pipeline on the same weights, in float32.

On pico for every path, and on the built-in model, where errors that random weights hide would show.
"""

import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from numpy.typing import NDArray
from PIL import Image

import deployments.builtin
from deployments.builtin.dequantise import dequantized_directory
from deployments.engine import Engine
from deployments.payloads import (
    DenoiseEvent,
    DenoiseJob,
    EncodedImage,
    Latents,
    PromptEmbedding,
    Stamp,
    StepProgress,
    TextJob,
)
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.text import TextEncoders
from deployments.sd3.vae import VaeDecoder
from deployments.sd3.wire import from_wire
from tests.inprocess.pico_folder import pico_as_stored

WAIT_S = 120
STEPS = 8
SEED = 11
NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
PROMPT = "a large red circle left of a small blue square"
NEGATIVE = "a green triangle"
BUILTIN = Path(deployments.builtin.__file__).parent / "weights"


@dataclass
class Both:
    """One model, loaded twice."""

    reference: Any  # StableDiffusion3Pipeline, float32
    text: TextEncoders
    mmdit: Mmdit
    vae: VaeDecoder
    length: int  # T5 tokens
    model_dir: Path

    def ours(
        self,
        width: int,
        height: int,
        guidance_scale: float = 4.0,
        init: EncodedImage | None = None,
        strength: float = 1.0,
    ) -> NDArray[np.float32]:
        """Denoise through the engine."""
        positive, negative = self.encode(PROMPT), self.encode(NEGATIVE)
        job = DenoiseJob(
            job_id="parity",
            image=0,
            width=width,
            height=height,
            guidance_scale=guidance_scale,
            sampler="euler",
            num_inference_steps=STEPS,
            scheduler="normal",
            shift=3.0,
            seed=SEED,
            positive=positive,
            negative=negative if guidance_scale > 1 else None,
            init=init,
            strength=strength,
        )
        events: queue.Queue[DenoiseEvent | BaseException] = queue.Queue()
        engine = Engine(self.mmdit, max_waiting=1)
        try:
            engine.submit(job, events.put)
            while isinstance(event := events.get(timeout=WAIT_S), StepProgress):
                pass
        finally:
            engine.close()
        assert isinstance(event, Latents), event
        return event.latents

    def encoded(self, pixels: NDArray[np.uint8]) -> EncodedImage:
        return EncodedImage(*self.vae.encode(pixels), NOBODY)

    def encode(self, prompt: str) -> PromptEmbedding:
        (encoded,) = self.text.encode([TextJob(prompt, prompt, prompt, self.length)])
        return PromptEmbedding(
            encoded.prompt_embeds, encoded.pooled_prompt_embeds, encoded.warnings, NOBODY
        )

    def theirs(self, width: int, height: int, guidance_scale: float, output_type: str) -> Any:
        return self.reference(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            width=width,
            height=height,
            num_inference_steps=STEPS,
            guidance_scale=guidance_scale,
            max_sequence_length=self.length,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type=output_type,
        ).images


@pytest.fixture(scope="module", params=["pico", "builtin"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp(request.param)
    model_dir = BUILTIN if request.param == "builtin" else pico_as_stored(folder / "pico")
    plain = dequantized_directory(model_dir, folder / "plain", torch.float32)
    reference = StableDiffusion3Pipeline.from_pretrained(plain, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    return Both(
        reference,
        TextEncoders.load(model_dir, "cpu", "fp32"),
        Mmdit.load(model_dir, "cpu", "fp32"),
        VaeDecoder.load(model_dir, "cpu", "fp32"),
        length=48,
        model_dir=model_dir,
    )


def relative(ours: Any, reference: Any) -> float:
    ours, reference = (np.asarray(torch.as_tensor(each).detach()) for each in (ours, reference))
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(
    "prompt",
    [PROMPT, "", 'the word "CAT"', "zzz unknown ☃ words", "a red circle " * 60],
    ids=["plain", "empty", "word", "unknown", "too long"],
)
def test_prompt_embeddings_are_the_pipelines(both, prompt):
    ours = both.encode(prompt)
    theirs, _, pooled, _ = both.reference.encode_prompt(
        prompt, prompt, prompt, do_classifier_free_guidance=False, max_sequence_length=both.length
    )
    assert ours.prompt_embeds.shape == theirs[0].shape
    assert relative(ours.prompt_embeds, theirs[0]) < 1e-5
    assert relative(ours.pooled_prompt_embeds, pooled[0]) < 1e-5


def test_three_different_prompts_reach_their_own_encoders(both):
    texts = ("a red circle", "a blue square", "a green star")
    (ours,) = both.text.encode([TextJob(*texts, both.length)])
    theirs, _, pooled, _ = both.reference.encode_prompt(
        *texts, do_classifier_free_guidance=False, max_sequence_length=both.length
    )
    assert relative(ours.prompt_embeds, theirs[0]) < 1e-5
    assert relative(ours.pooled_prompt_embeds, pooled[0]) < 1e-5


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (80, 112)])
def test_latents_are_the_pipelines(both, width, height, guidance_scale):
    ours = both.ours(width, height, guidance_scale)
    theirs = both.theirs(width, height, guidance_scale, "latent")[0]
    assert relative(ours, theirs) < 1e-4


def test_decoded_pixels_are_the_pipelines(both):
    latents = both.ours(96, 64)
    ours = both.vae.decode(latents)
    theirs = np.asarray(both.theirs(96, 64, 4.0, "pil")[0])
    assert ours.shape == theirs.shape == (64, 96, 3)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert ours.std() > 1  # a flat picture would agree with anything flat


def a_picture(width: int, height: int) -> NDArray[np.uint8]:
    """Blobs of colour: neither flat nor noise."""
    coarse = np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)
    blobs = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(blobs)


def test_a_start_image_is_encoded_as_diffusers_encodes_it(both):
    pixels = a_picture(96, 64)
    mean, std = both.vae.encode(pixels)
    vae = both.reference.vae
    image = both.reference.image_processor.preprocess(Image.fromarray(pixels))
    with torch.inference_mode():
        theirs = vae.encode(image).latent_dist
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    assert mean.shape == (16, 8, 12)
    assert relative(mean, ((theirs.mean - shift) * scale)[0]) < 1e-5
    assert relative(std, (theirs.std * scale)[0]) < 1e-5


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.62, 1.0])
def test_image_to_image_is_the_pipelines(both, strength):
    """Pixels: the same picture as StableDiffusion3Img2ImgPipeline's from the same seed."""
    pixels = a_picture(96, 64)
    reference = StableDiffusion3Img2ImgPipeline(**both.reference.components)
    reference.set_progress_bar_config(disable=True)
    theirs = reference(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=Image.fromarray(pixels),
        width=96,
        height=64,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        max_sequence_length=both.length,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]
    latents = both.ours(96, 64, init=both.encoded(pixels), strength=strength)
    ours = both.vae.decode(latents).astype(int)
    assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1
    # Not by having ignored the image: another one gives something else.
    other = both.ours(96, 64, init=both.encoded(pixels[::-1].copy()), strength=strength)
    assert strength == 1.0 or relative(other, latents) > 0.01


def test_fp8_weights_in_memory_give_what_their_float32_copies_give(both):
    precision = PrecisionChoice("fp8", "fp8", torch.float32, "for this test")
    mixed = Mmdit.load(both.model_dir, "cpu", precision, Optimizations(unpacked_weights=False))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, both.mmdit.in_channels, 8, 8, generator=generator)
    prompts = [both.encode(PROMPT), both.encode(NEGATIVE)]
    rows = [from_wire(prompt.prompt_embeds, "cpu", torch.float32) for prompt in prompts]
    pooled = [from_wire(prompt.pooled_prompt_embeds, "cpu", torch.float32) for prompt in prompts]
    inputs = (latents, torch.tensor([0.9, 0.3]), torch.stack(rows), torch.stack(pooled))
    exact = both.mmdit.velocity(*inputs)
    assert relative(mixed.velocity(*inputs), exact) < 1e-6
    assert mixed.resident_bytes < 0.6 * both.mmdit.resident_bytes
