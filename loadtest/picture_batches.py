"""Pictures by the hundred, straight from the model: for measuring what they show, not how fast.

Serving is left out on purpose; the parts are the served ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.payloads import TextJob
from deployments.sd3.lora_arena import pages_of
from deployments.sd3.lora_layers import PageUse
from deployments.sd3.lora_tensors import read_layers
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import choose_precision
from deployments.sd3.samplers import Sampler, SamplerState, start
from deployments.sd3.sigmas import make_sigmas
from deployments.sd3.text import EncodedPrompt, TextEncoders
from deployments.sd3.vae import VaeDecoder
from deployments.sd3.wire import from_wire
from serve.checkpoints.lora_file import BaseModel, read_lora
from serve.models import ModelSpec


@dataclass(frozen=True)
class PictureSettings:
    """What all pictures of a batch share.

    Attributes:
        width: pixels.
        height: pixels.
        num_inference_steps: of every picture.
        guidance_scale: above 1.
        shift: of the schedule.
        sampler: `euler` or `dpmpp_2m`; both step a whole batch at once.
        max_sequence_length: T5 tokens.
        guidance_interval: (low, high), noise levels outside of which there is no guidance; None
            guides every step.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    shift: float
    sampler: str
    max_sequence_length: int
    guidance_interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, spec: ModelSpec) -> PictureSettings:
        """The model's own defaults, with Euler steps."""
        defaults = spec.defaults
        return cls(
            width=defaults.width,
            height=defaults.height,
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            shift=defaults.shift,
            sampler="euler",
            max_sequence_length=defaults.max_sequence_length,
        )


class PictureBatches:
    """One model in one precision.

    Args:
        model_dir: Diffusers layout.
        precision: `fp8`, `bf16` or `fp32`.
        device: torch device.
        rows: pictures in one forward.

    Attributes:
        denoise_seconds: that the batches made so far took to denoise.
    """

    def __init__(self, model_dir: Path, precision: str, device: str, rows: int) -> None:
        self.precision = choose_precision(precision, device)
        self.text = TextEncoders.load(model_dir, device, self.precision)
        self.mmdit = Mmdit.load(model_dir, device, self.precision)
        self.vae = VaeDecoder.load(model_dir, device, self.precision)
        self.device = torch.device(device)
        self.rows = rows
        self._base = BaseModel.of_folder(model_dir)
        self._loras: tuple[PageUse, ...] = ()
        self.denoise_seconds = 0.0

    def adapt(self, lora: Path) -> None:
        """Let a LoRA of the transformer adapt, as served ones do, all pictures from now on.

        Raises:
            InvalidRequest: It is damaged, or for another model.
        """
        file = read_lora(lora, lora.stem, self._base)
        arena = self.mmdit.make_room_for_loras(pages_of(file.rank("transformer")))
        for page, content in enumerate(arena.pack(read_layers(file, file.of("transformer")))):
            arena.write(page, content)
        self._loras = tuple((page, 1.0) for page in range(arena.pages))

    def make(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        seeds: Sequence[int],
        settings: PictureSettings,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield pictures uint8 [height, width, 3] in the order of the prompts."""
        for begin in range(0, len(prompts), self.rows):
            part = slice(begin, begin + self.rows)
            positive = self._encode(prompts[part], settings)
            negative = self._encode(negative_prompts[part], settings)
            began = time.monotonic()
            latents = self._denoise(positive, negative, seeds[part], settings)
            if latents.is_cuda:
                torch.cuda.synchronize(latents.device)
            self.denoise_seconds += time.monotonic() - began
            yield from (self.vae.decode(picture) for picture in latents)

    def _encode(self, prompts: Sequence[str], settings: PictureSettings) -> list[EncodedPrompt]:
        length = settings.max_sequence_length
        return self.text.encode([TextJob(p, p, p, length) for p in prompts])

    @torch.inference_mode()
    def _denoise(
        self,
        positive: Sequence[EncodedPrompt],
        negative: Sequence[EncodedPrompt],
        seeds: Sequence[int],
        settings: PictureSettings,
    ) -> torch.Tensor:
        """Return float32 [pictures, C, h, w]."""
        rows = [*positive, *negative]
        dtype = self.precision.compute_dtype
        prompt_embeds, pooled = (
            torch.stack([from_wire(array, self.device, dtype) for array in arrays])
            for arrays in (
                [row.prompt_embeds for row in rows],
                [row.pooled_prompt_embeds for row in rows],
            )
        )
        sigmas = make_sigmas("normal", settings.num_inference_steps, settings.shift)
        sampler = Sampler(settings.sampler, sigmas.tolist())
        shape = (self.mmdit.in_channels, settings.height // 8, settings.width // 8)
        each = [start(seed, *shape) for seed in seeds]
        # Samplers are elementwise, so one state may hold all pictures; no noise is drawn later.
        stacked = torch.stack([state.latents for state in each]).to(self.device)
        state = SamplerState(stacked, 0, None, each[0].generator)
        while not sampler.is_finished(state):
            sigma = sampler.sigma(state)
            low, high = settings.guidance_interval or (0.0, 1.0)
            copies = 2 if low <= sigma <= high else 1  # the positive prompts come first
            count = copies * len(positive)
            velocity = self.mmdit.velocity(
                torch.cat([state.latents] * copies),
                torch.full((count,), sigma),
                prompt_embeds[:count],
                pooled[:count],
                [self._loras] * count,
            )
            if copies == 2:
                wanted, unwanted = velocity.chunk(2)
                velocity = unwanted + settings.guidance_scale * (wanted - unwanted)
            state = sampler.step(state, velocity)
        return state.latents
