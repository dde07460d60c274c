"""What the stages are asked to do for one job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.payloads import DenoiseJob, EncodedImage, PromptEmbedding, TextJob
from serve.loras import LoraUses
from serve.requests import GenerateRequest
from serve.running import RunningJob


@dataclass(frozen=True)
class Given:
    """What all pictures of a job share.

    Attributes:
        positive: Of the prompt.
        negative: Of the negative prompt; None where nothing is guided.
        init: The start image; None: noise alone.
        loras: Of text encoders and denoisers.
    """

    positive: PromptEmbedding
    negative: PromptEmbedding | None
    init: EncodedImage | None
    loras: LoraUses


def text_jobs(request: GenerateRequest, loras: LoraUses) -> tuple[TextJob, ...]:
    """Return the prompt's and, where guidance needs it, the negative prompt's.

    Args:
        request: Resolved.
        loras: Of the request.
    """
    prompts = [(request.prompt, request.prompt_2, request.prompt_3)]
    if request.guidance_scale is not None and request.guidance_scale > 1:
        prompts.append(
            (request.negative_prompt, request.negative_prompt_2, request.negative_prompt_3)
        )
    return tuple(
        TextJob(
            prompt=prompt,
            prompt_2=prompt if prompt_2 is None else prompt_2,
            prompt_3=prompt if prompt_3 is None else prompt_3,
            max_sequence_length=_resolved(request.max_sequence_length),
            loras=loras.text,
        )
        for prompt, prompt_2, prompt_3 in prompts
    )


def denoise_job(job: RunningJob, index: int, seed: int, given: Given) -> DenoiseJob:
    """Return what the denoiser is asked for one picture.

    Args:
        job: Its request is resolved.
        index: Of the picture.
        seed: Its own.
        given: What all pictures of the job share.
    """
    request = job.request
    return DenoiseJob(
        job_id=job.id,
        image=index,
        width=_resolved(request.width),
        height=_resolved(request.height),
        num_inference_steps=_resolved(request.num_inference_steps),
        guidance_scale=_resolved(request.guidance_scale),
        sampler=_resolved(request.sampler),
        scheduler=_resolved(request.scheduler),
        shift=_resolved(request.shift),
        seed=seed,
        positive=given.positive,
        negative=given.negative,
        priority=request.priority,
        deadline_s=job.seconds_left,
        guidance_interval=request.guidance_interval,
        negative_prompt_range=request.negative_prompt_range,
        preview_every=request.preview_every,
        loras=given.loras.denoise,
        init=given.init,
        strength=1.0 if given.init is None else _resolved(request.strength),
    )


def _resolved(value: Any) -> Any:
    if value is None:
        raise ValueError("the request is not resolved")
    return value
