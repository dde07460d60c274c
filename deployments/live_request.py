"""One request inside the engine, from admission to its last step."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from deployments.payloads import DenoiseJob, Latents, Stamp, StepProgress
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.samplers import Sampler, start
from deployments.sd3.sigmas import make_sigmas
from deployments.sd3.wire import from_wire
from serve.errors import StageFailed

OnEvent = Callable[[StepProgress | Latents | BaseException], None]

_LATENT_PIXELS = 8  # a latent is an 8 x 8 square of pixels


class VelocityModel(Protocol):
    """What the engine needs of a model; `deployments.sd3.mmdit.Mmdit` is one."""

    device: torch.device
    precision: PrecisionChoice
    in_channels: int

    def velocity(
        self, latents: Tensor, sigmas: Tensor, prompt_embeds: Tensor, pooled: Tensor
    ) -> Tensor:
        """Predict noise - image: [B, C, h, w], [B], [B, T, D], [B, P] -> float32 [B, C, h, w]."""


class Ticket:
    """A submitted request, as its owner holds it."""

    def __init__(self, job: DenoiseJob, on_event: OnEvent) -> None:
        self.job = job
        self.on_event = on_event
        self.submitted_at = time.monotonic()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask to stop: at once if it waits, at the next step if it runs; nothing if it is done."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """True once `cancel` was called."""
        return self._cancelled.is_set()


class LiveRequest:
    """A request between two of its steps: its rows, its sampler and its state.

    Args:
        ticket: What was submitted.
        model: That it will run on.

    Raises:
        InvalidRequest: Unknown sampler or scheduler, or a shift that cannot be.
    """

    def __init__(self, ticket: Ticket, model: VelocityModel) -> None:
        job = ticket.job
        self.ticket = ticket
        self.admitted_at = self.stepped_at = time.monotonic()
        self.precision = model.precision
        sigmas = make_sigmas(job.scheduler, job.num_inference_steps, job.shift)
        self.sampler = Sampler(job.sampler, sigmas)
        height, width = job.height // _LATENT_PIXELS, job.width // _LATENT_PIXELS
        state = start(job.seed, model.in_channels, height, width)
        self.state = replace(state, latents=state.latents.to(model.device))
        self.guidance_scale = job.guidance_scale
        # One row without guidance; with it two, the negative prompt first.
        prompts = [job.positive] if job.negative is None else [job.negative, job.positive]
        dtype = model.precision.compute_dtype
        self.prompt_embeds = torch.stack(
            [from_wire(prompt.prompt_embeds, model.device, dtype) for prompt in prompts]
        )
        self.pooled = torch.stack(
            [from_wire(prompt.pooled_prompt_embeds, model.device, dtype) for prompt in prompts]
        )

    @property
    def rows(self) -> int:
        """Rows it takes in a forward."""
        return len(self.prompt_embeds)

    @property
    def is_finished(self) -> bool:
        """True when no step is left."""
        return self.sampler.is_finished(self.state)

    def latent_rows(self) -> Tensor:
        """Return its latents, once for each of its rows: float32 [rows, C, h, w]."""
        return self.state.latents.expand(self.rows, -1, -1, -1)

    def sigma_rows(self) -> Tensor:
        """Return its noise level, once for each of its rows: float32 [rows] on the host."""
        return torch.full((self.rows,), self.sampler.sigma(self.state))

    def step(self, velocity: Tensor) -> StepProgress:
        """Take one step.

        Args:
            velocity: float32 [rows, C, h, w], the model's output for its rows.

        Raises:
            StageFailed: The velocity is not finite.
        """
        if self.rows == 2:
            negative, positive = velocity
            guided = negative + self.guidance_scale * (positive - negative)
        else:
            guided = velocity[0]
        number = self.state.step + 1
        if not bool(torch.isfinite(guided).all()):
            raise StageFailed(
                f"The denoiser produced NaN or infinite values in step {number} of "
                f"{self.sampler.steps}."
            )
        self.state = self.sampler.step(self.state, guided)
        before, self.stepped_at = self.stepped_at, time.monotonic()
        return StepProgress(number, self.sampler.steps, self.stepped_at - before)

    def result(self) -> Latents:
        """Return the finished latents, stamped."""
        stamp = Stamp(
            replica="",  # who runs an engine knows its own name
            pid=os.getpid(),
            precision=self.precision.name,
            queue_s=self.admitted_at - self.ticket.submitted_at,
            seconds=time.monotonic() - self.admitted_at,
        )
        return Latents(self.state.latents.to("cpu", torch.float32).numpy(), stamp)
