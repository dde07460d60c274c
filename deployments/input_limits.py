"""What a denoise job must look like to be denoised at all, checked before it is taken.

Jobs come from the Pipeline, which checks what callers send, and from the text stage; whoever calls
the stage by handle may still send anything. What is wrong with one job is told to that job alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deployments.job_size import LATENT_PIXELS
from deployments.payloads import DenoiseJob, PromptEmbedding
from serve.errors import InvalidRequest, StageFailed


@dataclass(frozen=True)
class InputLimits:
    """The shapes that one transformer takes; None where nothing is known."""

    joint_attention_dim: int | None = None  # width of prompt_embeds
    pooled_projection_dim: int | None = None  # width of pooled_prompt_embeds
    largest_side: int | None = None  # of the latents: the table of position embeddings ends there
    latent_channels: int | None = None
    patch_size: int = 2  # latents a side of a token

    def check(self, job: DenoiseJob) -> None:
        """Check a job's size, embeddings and start image.

        Raises:
            InvalidRequest: A size that the model cannot draw, no steps, or a strength out of range.
            StageFailed: Embeddings or latents of the wrong shape or dtype.
        """
        self._check_side("width", job.width)
        self._check_side("height", job.height)
        if job.num_inference_steps < 1:
            raise InvalidRequest(
                "A picture takes at least one step.",
                field="num_inference_steps",
                value=job.num_inference_steps,
                allowed="1 or more",
            )
        self._check_start(job)
        self._check_prompt("positive", job.positive)
        if job.negative is not None:
            self._check_prompt("negative", job.negative)
            self._check_pair(job.positive, job.negative)

    def _check_side(self, field: str, pixels: int) -> None:
        multiple = self.patch_size * LATENT_PIXELS
        largest = None if self.largest_side is None else self.largest_side * LATENT_PIXELS
        if pixels < multiple or pixels % multiple or (largest is not None and pixels > largest):
            upwards = "" if largest is None else f" to {largest}"
            raise InvalidRequest(
                f"Field {field!r}: this model cannot draw {pixels} pixels.",
                field=field,
                value=pixels,
                allowed=f"a multiple of {multiple} from {multiple}{upwards}",
            )

    def _check_start(self, job: DenoiseJob) -> None:
        if not 0 < job.strength <= 1 or (job.init is None and job.strength != 1):
            raise InvalidRequest(
                "This is no strength to start an image with.",
                field="strength",
                value=job.strength,
                allowed="above 0 and at most 1; 1 where there is no image to start from",
            )
        if job.init is None:
            return
        sides = [job.height // LATENT_PIXELS, job.width // LATENT_PIXELS]
        channels = "channels" if self.latent_channels is None else self.latent_channels
        allowed = f"finite float32 {[channels, *sides]}"
        for name in ("mean", "std"):
            array = getattr(job.init, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.float32:
                raise _wrong(f"init.{name}", "dtype", array, allowed)
            if (
                array.ndim != 3
                or list(array.shape[1:]) != sides
                or self.latent_channels not in (None, array.shape[0])
            ):
                raise _wrong(f"init.{name}", "shape", array, allowed)
            if not np.isfinite(array).all():
                raise StageFailed(
                    "The start image's latents hold NaN or infinite values.",
                    field=f"init.{name}",
                    allowed=allowed,
                )

    def _check_prompt(self, name: str, prompt: PromptEmbedding) -> None:
        for field, array, dimensions, width in (
            ("prompt_embeds", prompt.prompt_embeds, 2, self.joint_attention_dim),
            ("pooled_prompt_embeds", prompt.pooled_prompt_embeds, 1, self.pooled_projection_dim),
        ):
            last = "width" if width is None else str(width)
            allowed = f"float32 or uint16 (bfloat16 bits) [{'tokens, ' * (dimensions - 1)}{last}]"
            if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.uint16):
                raise _wrong(f"{name}.{field}", "dtype", array, allowed)
            if array.ndim != dimensions or not array.size or width not in (None, array.shape[-1]):
                raise _wrong(f"{name}.{field}", "shape", array, allowed)

    def _check_pair(self, positive: PromptEmbedding, negative: PromptEmbedding) -> None:
        for field in ("prompt_embeds", "pooled_prompt_embeds"):
            wanted, got = getattr(positive, field), getattr(negative, field)
            if wanted.shape != got.shape:
                allowed = f"the positive prompt's: {list(wanted.shape)}"
                raise _wrong(f"negative.{field}", "shape", got, allowed)


def _wrong(field: str, what: str, value: Any, allowed: str) -> StageFailed:
    is_array = isinstance(value, np.ndarray)
    shown = f"{value.dtype} {list(value.shape)}" if is_array else type(value).__name__
    return StageFailed(
        f"An input of the wrong {what} reached the denoiser.",
        field=field,
        value=shown,
        allowed=allowed,
    )
