"""One request inside the engine, from admission to its last step.

What each of its steps needs is settled at admission: whether guidance takes a second row, and
whether that row sees the negative prompt or nothing. So the policy can count the rows left.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deployments.job_size import LATENT_PIXELS, is_guided, live_bytes, token_shape
from deployments.payloads import (
    Checkpoint,
    DenoiseJob,
    Latents,
    Path,
    Stamp,
    StepProgress,
)
from deployments.schedule import Work
from deployments.sd3.lora_layers import PageUse
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.sampler_checkpoint import Checkpoints, restored
from deployments.sd3.samplers import Sampler, SamplerState, start, start_from_image
from deployments.sd3.sigmas import make_sigmas
from deployments.sd3.wire import from_wire
from deployments.ticket import Ticket


class VelocityModel(Protocol):
    """What the engine needs of a model; `deployments.sd3.mmdit.Mmdit` is one."""

    device: torch.device
    precision: PrecisionChoice
    in_channels: int

    def velocity(
        self,
        latents: Tensor,
        sigmas: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        loras: Sequence[Sequence[PageUse]] = (),
    ) -> Tensor:
        """Predict noise - image: [B, C, h, w], [B], [B, T, D], [B, P] -> float32 [B, C, h, w].

        `loras` are the pages that adapt each row; empty where none adapts any.
        """

    def path(
        self, height: int, width: int, text_tokens: int, rows: int, adapted: bool = False
    ) -> Path:
        """Return how `velocity` runs rows of this kind; sides of the latents."""


@dataclass(frozen=True)
class Conditioning:
    """One encoded prompt on the device."""

    prompt_embeds: Tensor  # [1, T, D]
    pooled: Tensor  # [1, P]

    def zeros(self) -> Conditioning:
        """Return the same shapes filled with 0, as ComfyUI's ConditioningZeroOut does."""
        return Conditioning(torch.zeros_like(self.prompt_embeds), torch.zeros_like(self.pooled))


class LiveRequest:
    """A request between two of its steps: its rows, its sampler and its state.

    Args:
        ticket: What was submitted.
        model: That it will run on.
        pages: Of LoRAs that adapt its rows.
        checkpoint_every: Steps between two checkpoints; 0: none.

    Raises:
        InvalidRequest: Unknown sampler or scheduler, or a shift that cannot be.
    """

    def __init__(
        self,
        ticket: Ticket,
        model: VelocityModel,
        pages: tuple[PageUse, ...] = (),
        checkpoint_every: int = 0,
    ) -> None:
        job = ticket.job
        self.pages = pages
        self.ticket = ticket
        self.began_at: float | None = None  # when a forward first took its rows
        self.precision = model.precision
        self.shape = token_shape(job)
        self.bytes = live_bytes(job, model.in_channels, model.precision.compute_dtype)
        sigmas = make_sigmas(job.scheduler, job.num_inference_steps, job.shift, job.strength)
        self.sampler = Sampler(job.sampler, sigmas)
        self._checkpoints = Checkpoints(job, self.sampler.steps, checkpoint_every)
        state = _first_state(job, model.in_channels, float(sigmas[0]))
        previous = None if state.previous is None else state.previous.to(model.device)
        self.state = replace(state, latents=state.latents.to(model.device), previous=previous)
        prompts = [job.negative, job.positive] if is_guided(job) else [job.positive]
        dtype = model.precision.compute_dtype
        *negative, self._positive = [
            Conditioning(
                from_wire(prompt.prompt_embeds, model.device, dtype)[None],
                from_wire(prompt.pooled_prompt_embeds, model.device, dtype)[None],
            )
            for prompt in prompts
            if prompt is not None
        ]
        self._unconditional = _unconditional(job, self.sampler.sigmas, negative)
        rows = [1 if each is None else 2 for each in self._unconditional]
        self._rows_left = [*accumulate(reversed(rows))][::-1]

    @property
    def is_finished(self) -> bool:
        """True when no step is left."""
        return self.sampler.is_finished(self.state)

    @property
    def rows(self) -> int:
        """Rows that its next step takes in a forward."""
        return len(self.conditionings())

    def conditionings(self) -> list[Conditioning]:
        """Return what the rows of its next step see: the unconditional row, if any, comes first."""
        unconditional = self._unconditional[self.state.step]
        return [self._positive] if unconditional is None else [unconditional, self._positive]

    def work(self) -> Work:
        """Return the request as the policy sees it."""
        done = self.state.step
        return Work(
            key=self.ticket.key,
            shape=self.shape,
            rows=self.rows,
            rows_left=self._rows_left[done],
            steps_left=self.sampler.steps - done,
            submitted_at=self.ticket.submitted_at,
            deadline=self.ticket.deadline,
            priority=self.ticket.job.priority,
            steps_done=done,
        )

    @property
    def wants_preview(self) -> bool:
        """True if its next step is to be shown; the last one is shown by the picture itself."""
        every, number = self.ticket.job.preview_every, self.state.step + 1
        return every > 0 and number % every == 0 and number < self.sampler.steps

    @property
    def has_begun(self) -> bool:
        """True once a forward took its rows."""
        return self.began_at is not None

    def begin(self, now: float) -> None:
        """Note that a forward takes its rows; until the first one it waited."""
        self.began_at = now if self.began_at is None else self.began_at

    def advance(self, state: SamplerState, seconds: float, path: Path) -> StepProgress:
        """Take over the state after a step and return what is told of it.

        Args:
            state: After the step.
            seconds: That the step's forward took.
            path: How it ran.
        """
        self.state = state
        checkpoint = self._checkpoints.after(state)
        return StepProgress(
            state.step, self.sampler.steps, seconds, path=path, checkpoint=checkpoint
        )

    def checkpoint(self) -> Checkpoint | None:
        """Return what another engine goes on from; None: it has not begun. Waits for the device."""
        return self._checkpoints.now(self.state)

    def result(self, now: float, joules: float | None) -> Latents:
        """Return the finished latents, stamped.

        Args:
            now: Seconds, by the clock that the ticket was stamped with.
            joules: That the request has used; None: not known.
        """
        began = now if self.began_at is None else self.began_at
        stamp = Stamp(
            replica="",  # who runs an engine knows its own name
            pid=os.getpid(),
            precision=self.precision.name,
            queue_s=began - self.ticket.submitted_at,
            seconds=now - began,
        )
        latents = self.state.latents.to("cpu", torch.float32).numpy()
        return Latents(latents, stamp, joules=joules)


def _first_state(job: DenoiseJob, channels: int, sigma: float) -> SamplerState:
    if job.resume is not None:
        return restored(job.resume)
    if job.init is None:
        return start(job.seed, channels, job.height // LATENT_PIXELS, job.width // LATENT_PIXELS)
    # Copies: arrays that came through an object store are read-only, which torch warns about.
    mean, std = (torch.from_numpy(np.array(each)) for each in (job.init.mean, job.init.std))
    return start_from_image(job.seed, mean, std, sigma)


def _unconditional(
    job: DenoiseJob, sigmas: Sequence[float], negative: Sequence[Conditioning]
) -> list[Conditioning | None]:
    """Return for each step what its unconditional row sees; None where it takes no such row."""
    if not negative:
        return [None] * (len(sigmas) - 1)
    (given,) = negative
    low, high = job.guidance_interval or (0.0, float("inf"))
    first, last = (_sigma_at(fraction, job.shift) for fraction in job.negative_prompt_range)
    seen = [last <= sigma <= first for sigma in sigmas[:-1]]
    zeros = given if all(seen) else given.zeros()
    return [
        None if not low <= sigma <= high else given if sees else zeros
        for sigma, sees in zip(sigmas[:-1], seen, strict=True)
    ]


def _sigma_at(fraction: float, shift: float) -> float:
    """Return the noise level at a fraction of sampling.

    ComfyUI `comfy/model_sampling.py`, ModelSamplingDiscreteFlow.percent_to_sigma.
    """
    if fraction <= 0:
        return 1.0
    if fraction >= 1:
        return 0.0
    left = 1 - fraction
    return shift * left / (1 + (shift - 1) * left)
