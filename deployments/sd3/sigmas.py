"""Noise levels of a run: ComfyUI's schedulers for flow models with a shift.

Sources: ComfyUI `comfy/samplers.py` (normal_scheduler, simple_scheduler, beta_scheduler) over
`comfy/model_sampling.py` (ModelSamplingDiscreteFlow, 1000 timesteps). `normal` also is diffusers'
`FlowMatchEulerDiscreteScheduler(shift)`, exactly: both apply the shift to levels already shifted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.errors import InvalidRequest

TRAIN_TIMESTEPS = 1000

Float64 = NDArray[np.float64]


def steps_taken(num_inference_steps: int, strength: float) -> int:
    """Return how many of a run's steps image-to-image takes: the last ones, one at least.

    diffusers, StableDiffusion3Img2ImgPipeline.get_timesteps.

    Args:
        num_inference_steps: Of the whole run, 1 or more.
        strength: Above 0, at most 1: all of them.
    """
    begin = int(num_inference_steps - num_inference_steps * strength)
    return max(num_inference_steps - begin, 1)


def make_sigmas(
    scheduler: str, num_inference_steps: int, shift: float, strength: float = 1.0
) -> NDArray[np.float32]:
    """Return the noise levels of a run, falling from (at most) 1 to 0.

    Args:
        scheduler: `normal`, `simple`, `sgm_uniform` or `beta`.
        num_inference_steps: At least 1.
        shift: Above 0; more than 1 spends more steps at high noise.
        strength: Above 0, at most 1. Below 1 the run begins in the middle, with its last
            `steps_taken` steps.

    Returns:
        float32 [steps + 1], strictly falling. `beta` merges steps that would repeat a level, as
        ComfyUI does, so a long run may have fewer steps than were asked for.

    Raises:
        InvalidRequest: Unknown scheduler, or a shift so extreme that levels coincide.
    """
    if scheduler not in _SCHEDULERS:
        raise InvalidRequest(
            f"Unknown scheduler {scheduler!r}.",
            field="scheduler",
            value=scheduler,
            allowed="one of: " + ", ".join(_SCHEDULERS),
        )
    with np.errstate(all="ignore"):  # what overflows is refused below, in words
        levels = _SCHEDULERS[scheduler](num_inference_steps, shift).astype(np.float32)
    # With some shifts the float32 table ends a rounding above 1: less than nothing of the image.
    levels = np.minimum(levels, np.float32(1))
    if not (np.isfinite(levels).all() and (np.diff(levels) < 0).all()):
        raise InvalidRequest(
            f"With shift {shift} and {num_inference_steps} steps, scheduler {scheduler!r} has"
            f" noise levels that coincide.",
            field="shift",
            value=shift,
            allowed="a shift nearer to 1",
        )
    return levels[-(steps_taken(num_inference_steps, strength) + 1) :]


def _shifted(level: Any, shift: float) -> Any:
    """`time_snr_shift` of ComfyUI: levels in (0, 1], 1 stays 1."""
    return shift * level / (1 + (shift - 1) * level)


def _table(shift: float) -> Float64:
    """Return the model's own noise levels, rising, as float32 numbers: both sources keep those."""
    plain = np.arange(1, TRAIN_TIMESTEPS + 1, dtype=np.float32) / np.float32(TRAIN_TIMESTEPS)
    table: Float64 = _shifted(plain, np.float32(shift)).astype(np.float64)  # type: ignore[arg-type]
    return table


def _normal(steps: int, shift: float) -> Float64:
    table = _table(shift)
    end = float(_shifted(table[0], shift))
    if math.isclose(end, 0.0, abs_tol=1e-5):
        # ComfyUI then takes that end for zero and adds none. Zero itself is meant.
        return np.append(_shifted(np.linspace(table[-1], table[0], steps + 1), shift)[:-1], 0.0)
    return np.append(_shifted(np.linspace(table[-1], table[0], steps), shift), 0.0)


def _sgm_uniform(steps: int, shift: float) -> Float64:
    table = _table(shift)
    return np.append(_shifted(np.linspace(table[-1], table[0], steps + 1)[:-1], shift), 0.0)


def _simple(steps: int, shift: float) -> Float64:
    table = _table(shift)
    stride = len(table) / steps
    return np.array([table[-(1 + int(step * stride))] for step in range(steps)] + [0.0])


def _beta(steps: int, shift: float, alpha: float = 0.6, beta: float = 0.6) -> Float64:
    from scipy.special import betaincinv  # a third of a second, which most replicas never need

    table = _table(shift)
    quantiles = 1 - np.linspace(0, 1, steps, endpoint=False)
    # What scipy.stats.beta.ppf computes, without the second that importing scipy.stats takes.
    indices = np.rint(betaincinv(alpha, beta, quantiles) * (len(table) - 1)).astype(int)
    unique = [index for at, index in enumerate(indices) if at == 0 or index != indices[at - 1]]
    return np.append(table[unique], 0.0)


_SCHEDULERS: dict[str, Callable[[int, float], Float64]] = {
    "normal": _normal,
    "simple": _simple,
    "sgm_uniform": _sgm_uniform,
    "beta": _beta,
}
