"""A sampler's state as numpy and back: what a picture takes along to another process.

Making one must not stall the device. On a GPU the copy to the host is queued behind the step that
it belongs to and handed out after the next one, which the host has waited for anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deployments.payloads import Checkpoint, DenoiseJob
from deployments.sd3.samplers import HAS_HISTORY, SamplerState
from deployments.sd3.sigmas import make_sigmas
from serve.move_errors import CheckpointRefused

VERSION = 2
"""Rises with any change of `Checkpoint` or of what samplers read from it."""

_LATENT_PIXELS = 8


@dataclass(frozen=True)
class StateCopy:
    """A state on the host, or on its way there."""

    step: int
    latents: Tensor  # float32 [C, h, w]
    previous: Tensor | None
    generator: Tensor  # uint8 [bytes]

    @classmethod
    def begin(cls, state: SamplerState) -> StateCopy:
        """Queue the copy behind the device's work; it is there once the device has been awaited."""
        previous = None if state.previous is None else _to_host(state.previous)
        return cls(state.step, _to_host(state.latents), previous, state.generator)

    def checkpoint(self, job: DenoiseJob, steps: int) -> Checkpoint:
        """Return it as it travels; the copy must be there."""
        return Checkpoint(
            version=VERSION,
            step=self.step,
            steps=steps,
            sampler=job.sampler,
            scheduler=job.scheduler,
            shift=job.shift,
            seed=job.seed,
            latents=self.latents.numpy(),
            previous=None if self.previous is None else self.previous.numpy(),
            generator=self.generator.numpy(),
            strength=job.strength,
        )


class Checkpoints:
    """Of one request: one every few steps, each handed out a step after its own.

    Args:
        job: Of the request.
        steps: That it takes; some schedulers drop those that would change nothing.
        every: Steps between two; 0: none.
    """

    def __init__(self, job: DenoiseJob, steps: int, every: int) -> None:
        self._job = job
        self._steps = steps
        self._every = every
        self._begun: StateCopy | None = None

    def after(self, state: SamplerState) -> Checkpoint | None:
        """Return the checkpoint that is there now, and begin the next one if it is due.

        Args:
            state: After a step that the device has been awaited for.
        """
        begun, self._begun = self._begun, None
        # With one step left it would be there when the picture is.
        is_due = self._every > 0 and state.step % self._every == 0
        if is_due and state.step < self._steps - 1:
            self._begun = StateCopy.begin(state)
        return None if begun is None else begun.checkpoint(self._job, self._steps)

    def now(self, state: SamplerState) -> Checkpoint | None:
        """Return the state's own checkpoint, waiting for the device; None before the first step."""
        if not state.step:
            return None
        copy = StateCopy.begin(state)
        if state.latents.device.type == "cuda":
            torch.cuda.synchronize(state.latents.device)
        return copy.checkpoint(self._job, self._steps)


def restored(checkpoint: Checkpoint) -> SamplerState:
    """Return the state that a checkpoint holds, on the CPU; `check_fits` comes first."""
    previous = None if checkpoint.previous is None else _tensor(checkpoint.previous)
    generator = _tensor(checkpoint.generator)
    return SamplerState(_tensor(checkpoint.latents), checkpoint.step, previous, generator)


def check_fits(checkpoint: Checkpoint, job: DenoiseJob, channels: int) -> None:
    """See that a job can go on from a checkpoint.

    Args:
        checkpoint: From anywhere.
        job: Of the picture.
        channels: Of the model's latents.

    Raises:
        CheckpointRefused: It is another version's, another picture's, or damaged; says what of it.
        InvalidRequest: The job's scheduler or shift cannot be.
    """
    if checkpoint.version != VERSION:
        raise _refused("version", checkpoint.version, f"{VERSION}")
    shape = (channels, job.height // _LATENT_PIXELS, job.width // _LATENT_PIXELS)
    has_history = job.sampler in HAS_HISTORY
    sigmas = make_sigmas(job.scheduler, job.num_inference_steps, job.shift, job.strength)
    expected = {
        "steps": len(sigmas) - 1,
        "sampler": job.sampler,
        "scheduler": job.scheduler,
        "shift": job.shift,
        "seed": job.seed,
        "strength": job.strength,
    }
    for field, allowed in expected.items():
        if (value := getattr(checkpoint, field)) != allowed:
            raise _refused(field, value, f"{allowed}, as in its job")
    if not 0 < checkpoint.step < checkpoint.steps:
        raise _refused("step", checkpoint.step, f"1 to {checkpoint.steps - 1}")
    if (checkpoint.previous is not None) != has_history:
        raise _refused("previous", checkpoint.previous, "there for multistep samplers only")
    for field in ("latents", "previous"):
        array = getattr(checkpoint, field)
        if array is not None:
            _check_array(field, array, shape)
    try:
        torch.Generator("cpu").set_state(_tensor(checkpoint.generator))
    except (RuntimeError, TypeError):
        size = np.shape(checkpoint.generator)
        raise _refused("generator", size, "the state of a generator of this torch") from None


def _check_array(field: str, array: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype != np.float32:
        raise _refused(field, f"{array.dtype} {list(array.shape)}", f"float32 {list(shape)}")
    if not np.isfinite(array).all():
        raise _refused(field, "NaN or infinite", "finite numbers")


def _refused(field: str, value: object, allowed: str) -> CheckpointRefused:
    return CheckpointRefused(
        f"The checkpoint's {field!r} does not fit.",
        field=f"resume.{field}",
        value=value,
        allowed=allowed,
    )


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.detach()  # no step writes into what another one made
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def _tensor(array: NDArray[np.float32] | NDArray[np.uint8]) -> Tensor:
    # A copy: arrays that came through an object store are read-only, which torch warns about.
    return torch.from_numpy(np.array(array))
