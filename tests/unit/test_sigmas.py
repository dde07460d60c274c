"""Noise levels against diffusers, and against ComfyUI's formulas as they stand there."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.sd3.sigmas import make_sigmas, steps_taken
from serve.errors import InvalidRequest

SCHEDULERS = ("normal", "simple", "sgm_uniform", "beta")
STEPS = (1, 2, 4, 8, 20, 28, 40, 50, 200)


class ComfyModelSampling:
    """ModelSamplingDiscreteFlow, with the members that the schedulers read."""

    def __init__(self, shift: float) -> None:
        self.shift = shift
        self.sigmas = self.sigma((torch.arange(1, 1001, 1) / 1000) * 1000)
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * 1000

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep / 1000
        return t if self.shift == 1.0 else self.shift * t / (1 + (self.shift - 1) * t)


def comfy_normal(s: ComfyModelSampling, steps: int, sgm: bool = False) -> list[float]:
    start, end = s.timestep(s.sigma_max), s.timestep(s.sigma_min)
    append_zero = True
    if sgm:
        timesteps = torch.linspace(start, end, steps + 1)[:-1]
    else:
        if math.isclose(float(s.sigma(end)), 0, abs_tol=0.00001):
            steps += 1
            append_zero = False
        timesteps = torch.linspace(start, end, steps)
    sigs = [float(s.sigma(timesteps[x])) for x in range(len(timesteps))]
    return [*sigs, 0.0] if append_zero else sigs


def comfy_simple(s: ComfyModelSampling, steps: int) -> list[float]:
    ss = len(s.sigmas) / steps
    return [float(s.sigmas[-(1 + int(x * ss))]) for x in range(steps)] + [0.0]


def comfy_beta(
    s: ComfyModelSampling, steps: int, alpha: float = 0.6, beta: float = 0.6
) -> list[float]:
    total_timesteps = len(s.sigmas) - 1
    ts = 1 - np.linspace(0, 1, steps, endpoint=False)
    ts = np.rint(scipy.stats.beta.ppf(ts, alpha, beta) * total_timesteps)
    sigs = []
    last_t = -1
    for t in ts:
        if t != last_t:
            sigs += [float(s.sigmas[int(t)])]
        last_t = t
    return [*sigs, 0.0]


COMFY: dict[str, Callable[[ComfyModelSampling, int], list[float]]] = {
    "normal": comfy_normal,
    "simple": comfy_simple,
    "sgm_uniform": lambda s, steps: comfy_normal(s, steps, sgm=True),
    "beta": comfy_beta,
}


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("steps", STEPS)
def test_normal_is_diffusers_flow_match_euler(steps, shift):
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(steps)
    assert make_sigmas("normal", steps, shift).tolist() == reference.sigmas.tolist()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.3])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_comfyui(scheduler, steps, shift):
    ours = make_sigmas(scheduler, steps, shift)
    reference = COMFY[scheduler](ComfyModelSampling(shift), steps)
    assert len(ours) == len(reference)
    np.testing.assert_allclose(ours, reference, atol=2e-7, rtol=2e-6)


@pytest.mark.parametrize("strength", [0.001, 0.1, 0.3, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("steps", STEPS)
def test_strength_begins_where_diffusers_image_to_image_does(steps, strength):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    stand_in = SimpleNamespace(scheduler=scheduler)
    timesteps, taken = StableDiffusion3Img2ImgPipeline.get_timesteps(
        stand_in, steps, strength, "cpu"
    )
    ours = make_sigmas("normal", steps, 3.0, strength)
    assert steps_taken(steps, strength) == taken == len(timesteps) == len(ours) - 1
    assert ours.tolist() == scheduler.sigmas[scheduler.begin_index :].tolist()


@pytest.mark.parametrize("denoise", [0.2, 0.3, 0.5, 0.55, 0.87, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_strength_of_more_steps_is_comfyuis_denoise(scheduler, denoise):
    """KSampler.set_steps: of int(steps / denoise) steps the last `steps`."""
    for steps in (1, 4, 20, 31):
        whole = int(steps / denoise)
        reference = COMFY[scheduler](ComfyModelSampling(3.0), whole)[-(steps + 1) :]
        ours = make_sigmas(scheduler, whole, 3.0, denoise)
        np.testing.assert_allclose(ours, reference, atol=2e-7, rtol=2e-6)


@given(steps=st.integers(1, 200), strength=st.floats(0, 1, exclude_min=True))
def test_any_strength_takes_one_step_at_least_and_never_more_than_there_are(steps, strength):
    assert 1 <= steps_taken(steps, strength) <= steps


def test_last_level_of_normal_shows_the_shift_taken_twice():
    assert make_sigmas("normal", 28, 3.0)[-2] == pytest.approx(0.0089, abs=1e-4)


def test_an_end_that_comfyui_takes_for_zero_is_zero():
    ours = make_sigmas("normal", 10, 0.05)
    reference = comfy_normal(ComfyModelSampling(0.05), 10)
    assert ours[-1] == 0.0
    np.testing.assert_allclose(ours, reference, atol=1e-5)


@settings(deadline=None)
@given(
    scheduler=st.sampled_from(SCHEDULERS),
    steps=st.integers(1, 200),
    shift=st.floats(0.05, 20.0),
)
def test_levels_fall_from_at_most_one_to_zero(scheduler, steps, shift):
    sigmas = make_sigmas(scheduler, steps, shift)
    assert sigmas.dtype == np.float32
    assert 0 < sigmas[0] <= 1
    assert sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()
    assert len(sigmas) == steps + 1 if scheduler != "beta" else len(sigmas) <= steps + 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("shift", [0.01, 100.0])
def test_a_strange_shift_still_gives_a_run(scheduler, shift):
    sigmas = make_sigmas(scheduler, 200, shift)
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("shift", [1e-300, 1e-45])
def test_a_shift_that_makes_levels_coincide_is_refused(shift):
    with pytest.raises(InvalidRequest) as caught:
        make_sigmas("normal", 20, shift)
    assert caught.value.field == "shift"


def test_an_unknown_scheduler_is_refused_by_name():
    with pytest.raises(InvalidRequest) as caught:
        make_sigmas("karras", 10, 3.0)
    assert caught.value.field == "scheduler"
    assert "sgm_uniform" in str(caught.value.allowed)
