"""A real step of requests that nobody sent: what a replica does at start-up with every bucket.

Not the forward alone: guidance, the sampler and the check of what came run as they will for
requests, so that nothing which is used for the first time is left for the first of them.
"""

from __future__ import annotations

import numpy as np
import torch

from deployments.forward import step_together
from deployments.job_size import LATENT_PIXELS
from deployments.live_request import LiveRequest, VelocityModel
from deployments.payloads import DenoiseJob, PromptEmbedding, Stamp
from deployments.step_costs import TokenShape
from deployments.ticket import Ticket

_NOBODY = Stamp(replica="", pid=0, precision="", queue_s=0.0, seconds=0.0)
_GUIDED, _UNGUIDED = 4.0, 1.0


@torch.inference_mode()
def make_step(
    model: VelocityModel, shape: TokenShape, rows: int, embedding_widths: tuple[int, int]
) -> None:
    """Step requests of so many rows together: guided pairs, and one without guidance if odd.

    Args:
        model: Loaded.
        shape: Of the requests.
        rows: Of the forward.
        embedding_widths: Of a prompt's embedding, and of the pooled one.

    Raises:
        StageFailed: What came is not finite.
        Exception: What the model raises.
    """
    random = np.random.default_rng(0)
    joint, pooled = embedding_widths
    prompt = PromptEmbedding(
        prompt_embeds=random.standard_normal((shape.text_tokens, joint), np.float32),
        pooled_prompt_embeds=random.standard_normal(pooled, np.float32),
        warnings=(),
        stamp=_NOBODY,
    )
    scales = [_GUIDED] * (rows // 2) + [_UNGUIDED] * (rows % 2)
    stepped = step_together(model, [_request(model, shape, prompt, scale) for scale in scales])
    for each in stepped:
        if isinstance(each, Exception):
            raise each


def _request(
    model: VelocityModel, shape: TokenShape, prompt: PromptEmbedding, scale: float
) -> LiveRequest:
    job = DenoiseJob(
        job_id="warm-up",
        image=0,
        width=shape.width * LATENT_PIXELS,
        height=shape.height * LATENT_PIXELS,
        num_inference_steps=2,
        guidance_scale=scale,
        sampler="euler",
        scheduler="normal",
        shift=3.0,
        seed=0,
        positive=prompt,
        negative=prompt if scale > 1 else None,
    )
    return LiveRequest(Ticket(job, lambda event: None, 0, 0.0), model)
