"""What a result says of the stages that made it, from what they told."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from deployments.payloads import Latents, PromptEmbedding, Stamp
from serve.requests import ForwardPath, StageReport


def report(
    stage: Literal["text", "encode", "denoise", "decode", "store"], stamp: Stamp, image: int | None
) -> StageReport:
    """Return what one stage did for a picture, or for all of them where `image` is None."""
    return StageReport(stage=stage, image=image, **asdict(stamp))


def text_report(positive: PromptEmbedding, negative: PromptEmbedding | None) -> StageReport:
    """Return what encoding the prompts took."""
    told = report("text", positive.stamp, None)
    seconds = told.seconds + (0.0 if negative is None else negative.stamp.seconds)
    return told.model_copy(update={"seconds": seconds, "tokens": positive.tokens})


def denoise_report(latents: Latents, paths: set[ForwardPath], image: int) -> StageReport:
    """Return what denoising a picture took, and how its forwards ran."""
    path: ForwardPath | None = next(iter(paths)) if len(paths) == 1 else "mixed" if paths else None
    told = report("denoise", latents.stamp, image)
    way = {"moves": latents.moves, "steps_repeated": latents.steps_repeated}
    return told.model_copy(update={"path": path, "joules": latents.joules, **way})


def sum_of(joules: list[float | None]) -> float | None:
    """Return the sum, or None as soon as one is not known: a part would pass for the whole."""
    known = [one for one in joules if one is not None]
    return sum(known) if len(known) == len(joules) else None
