"""How large a denoising job is: in tokens, in rows of a forward and in bytes of memory."""

from __future__ import annotations

import torch

from deployments.payloads import DenoiseJob
from deployments.step_costs import TokenShape

LATENT_PIXELS = 8  # a latent is an 8 x 8 square of pixels
_FLOAT32_BYTES = 4


def token_shape(job: DenoiseJob) -> TokenShape:
    """Return what a job's rows must share with others to enter a forward together."""
    text_tokens = job.positive.prompt_embeds.shape[0]
    return TokenShape(job.height // LATENT_PIXELS, job.width // LATENT_PIXELS, text_tokens)


def is_guided(job: DenoiseJob) -> bool:
    """True if some step may take two rows; at a scale of 1 the negative prompt cancels out."""
    return job.negative is not None and job.guidance_scale > 1


def most_rows(job: DenoiseJob) -> int:
    """Return the rows of its widest step."""
    return 2 if is_guided(job) else 1


def live_bytes(job: DenoiseJob, channels: int, dtype: torch.dtype) -> int:
    """Return what a job holds on the device between two forwards.

    Args:
        job: Of the request.
        channels: Of the latents.
        dtype: That embeddings are kept in.
    """
    shape = token_shape(job)
    # Latents, the multistep sampler's history, and the next of both while a step is taken.
    latents = 4 * channels * shape.height * shape.width * _FLOAT32_BYTES
    prompts = 3 if is_guided(job) else 1  # the zeros outside the negative prompt's range count too
    numbers = job.positive.prompt_embeds.size + job.positive.pooled_prompt_embeds.size
    return latents + prompts * int(numbers) * dtype.itemsize
