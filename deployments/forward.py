"""One forward over the rows of several requests, and one step of each one's own sampler.

`step_together` waits for the device once, however many requests share the forward: what is computed
for each of them is queued before that, and thrown away for those whose values turn out to be wrong.
Afterwards the engine waits once for each preview that is due and each picture that is finished, to
copy it to the host; nothing else waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.live_request import Conditioning, LiveRequest, VelocityModel
from deployments.sd3.samplers import SamplerState
from serve.errors import StageFailed

# Noise minus image, both of about unit variance: guided as far as requests may ask, it stays in the
# tens. What is far beyond comes of broken weights or inputs, and no picture comes of it.
LARGEST_VELOCITY = 1e4


@dataclass(frozen=True)
class Stepped:
    """One request after its step."""

    state: SamplerState
    denoised: Tensor | None  # [C, h, w], the estimate of the picture, where a preview is due


def step_together(model: VelocityModel, chosen: Sequence[LiveRequest]) -> list[Stepped | Exception]:
    """Run one forward and step each request by its own rows; their states are left as they are.

    Args:
        model: Predicts velocities.
        chosen: Requests of one token shape, none finished.

    Returns:
        For each request what came of it, in order; StageFailed where its velocity is not finite.

    Raises:
        Exception: What the model raises; it concerns them all.
    """
    rows: list[tuple[LiveRequest, Conditioning]] = []
    first_rows: list[int] = []
    last_rows: list[int] = []
    for live in chosen:
        first_rows.append(len(rows))
        rows += [(live, conditioning) for conditioning in live.conditionings()]
        last_rows.append(len(rows) - 1)
    sigmas = [live.sampler.sigma(live.state) for live in chosen]
    device = model.device
    row_sigmas = _on(device, [live.sampler.sigma(live.state) for live, _ in rows])
    negative, positive = _on(device, first_rows), _on(device, last_rows)
    scale = _on(device, [live.ticket.job.guidance_scale for live in chosen])
    velocity = model.velocity(
        torch.stack([live.state.latents for live, _ in rows]),
        row_sigmas,
        torch.cat([conditioning.prompt_embeds for _, conditioning in rows]),
        torch.cat([conditioning.pooled for _, conditioning in rows]),
        [live.pages for live, _ in rows] if any(live.pages for live in chosen) else (),
    )
    guided = _guided(velocity, negative, positive, scale)
    is_sound = (guided.abs() <= LARGEST_VELOCITY).flatten(1).all(dim=1)  # NaN is no less than it
    stepped: list[Stepped | Exception] = []
    for live, sigma, own in zip(chosen, sigmas, guided, strict=True):
        try:
            state = live.sampler.step(live.state, own)
            denoised = live.state.latents - sigma * own if live.wants_preview else None
            stepped.append(Stepped(state, denoised))
        except (ArithmeticError, ValueError) as error:  # of its own numbers
            stepped.append(error)
    # The only place here where the host waits for the device.
    return [
        each if sound else _not_sound(live)
        for live, each, sound in zip(chosen, stepped, is_sound.tolist(), strict=True)
    ]


def _on(device: torch.device, numbers: list[int] | list[float]) -> Tensor:
    """Copy numbers to the device; float32 or int64 [numbers]."""
    tensor = torch.tensor(numbers)
    # From pinned memory the host need not wait for the copy.
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def _guided(velocity: Tensor, negative: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    """Apply each request's guidance.

    Args:
        velocity: float32 [rows, C, h, w].
        negative: int64 [requests], the unconditional row of each; the same as `positive` where
            there is one row only, which is then left as it is.
        positive: int64 [requests], the conditional row of each.
        scale: float32 [requests], guidance.

    Returns:
        float32 [requests, C, h, w].
    """
    if len(velocity) == len(positive):
        return velocity
    without, with_prompt = velocity[negative], velocity[positive]
    return without + scale[:, None, None, None] * (with_prompt - without)


def _not_sound(live: LiveRequest) -> StageFailed:
    return StageFailed(
        f"The denoiser produced NaN, infinite or absurdly large values in step "
        f"{live.state.step + 1} of {live.sampler.steps}."
    )
