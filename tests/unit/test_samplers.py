"""Samplers against diffusers and ComfyUI's formulas; and a state that can stop and go on."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deployments.sd3.noise import request_generator
from deployments.sd3.samplers import Sampler, SamplerState, start
from deployments.sd3.sigmas import make_sigmas
from serve.errors import InvalidRequest

SAMPLERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde")
SCHEDULERS = ("normal", "simple", "sgm_uniform", "beta")
SHAPE = (4, 6, 5)


def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth made-up model: something that bends, and depends on the noise level."""
    return torch.tanh(latents * 1.3 + sigma) + 0.3 * latents


def run(name: str, sigmas: NDArray[np.float32], seed: int = 3) -> SamplerState:
    sampler = Sampler(name, sigmas)
    state = start(seed, *SHAPE)
    while not sampler.is_finished(state):
        state = sampler.step(state, velocity(state.latents, sampler.sigma(state)))
    return state


def sigma_fn(t: torch.Tensor) -> torch.Tensor:
    return t.neg().exp()


def t_fn(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.log().neg()


def comfy_dpmpp_2m(x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    old_denoised = None
    for i in range(len(sigmas) - 1):
        denoised = x - sigmas[i] * velocity(x, float(sigmas[i]))
        t, t_next = t_fn(sigmas[i]), t_fn(sigmas[i + 1])
        h = t_next - t
        if old_denoised is None or sigmas[i + 1] == 0:
            x = (sigma_fn(t_next) / sigma_fn(t)) * x - (-h).expm1() * denoised
        else:
            h_last = t - t_fn(sigmas[i - 1])
            r = h_last / h
            denoised_d = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old_denoised
            x = (sigma_fn(t_next) / sigma_fn(t)) * x - (-h).expm1() * denoised_d
        old_denoised = denoised
    return x


def close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    error = (ours - reference).norm() / reference.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("steps", [1, 2, 8, 28])
def test_euler_is_diffusers_flow_match_euler(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    x = start(3, *SHAPE).latents
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(velocity(x, float(sigma)), t, x, return_dict=False)[0]
    assert torch.equal(run("euler", make_sigmas("normal", steps, 3.0)).latents, x)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_dpmpp_2m_is_comfyuis(steps, scheduler):
    sigmas = make_sigmas(scheduler, steps, 3.0)
    reference = comfy_dpmpp_2m(start(3, *SHAPE).latents, torch.from_numpy(sigmas))
    close(run("dpmpp_2m", sigmas).latents, reference, 1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [2, 3, 20])
def test_dpmpp_2m_sde_is_diffusers(steps, scheduler):
    sigmas = make_sigmas(scheduler, steps, 3.0)
    reference = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        final_sigmas_type="zero",
    )
    reference.set_timesteps(steps)
    reference.sigmas = torch.from_numpy(sigmas)
    reference.timesteps = reference.sigmas[:-1] * 1000
    generator = request_generator(3)
    x = torch.randn((1, *SHAPE), generator=generator)
    for t, sigma in zip(reference.timesteps, sigmas, strict=False):
        noise = torch.zeros_like(x)
        if reference.step_index is None or reference.step_index < steps - 1:
            noise = torch.randn(x.shape, generator=generator)
        x = reference.step(velocity(x, float(sigma)), t, x, variance_noise=noise).prev_sample
    close(run("dpmpp_2m_sde", sigmas).latents, x[0], 1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_exact_model_is_followed_to_its_image(name):
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(name, make_sigmas("normal", 10, 3.0))
    state = start(0, *SHAPE)
    while not sampler.is_finished(state):
        sigma = sampler.sigma(state)
        state = sampler.step(state, (state.latents - image) / sigma)
    close(state.latents, image, 1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_resumed_elsewhere_ends_in_the_same_bytes(name, stop):
    sigmas = make_sigmas("beta", 8, 3.0)
    whole = run(name, sigmas).latents
    sampler, state = Sampler(name, sigmas), start(3, *SHAPE)
    for _ in range(stop):
        state = sampler.step(state, velocity(state.latents, sampler.sigma(state)))
    # What would travel: plain arrays and a number.
    previous = None if state.previous is None else state.previous.numpy()
    packed = (state.latents.numpy(), state.step, previous, state.generator.numpy())
    del state, sampler
    resumed = SamplerState(
        torch.from_numpy(packed[0]),
        packed[1],
        None if packed[2] is None else torch.from_numpy(packed[2]),
        torch.from_numpy(packed[3]),
    )
    sampler = Sampler(name, sigmas)
    while not sampler.is_finished(resumed):
        resumed = sampler.step(resumed, velocity(resumed.latents, sampler.sigma(resumed)))
    assert torch.equal(resumed.latents, whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_stepping_leaves_the_state_it_was_given_alone(name):
    sampler, state = Sampler(name, make_sigmas("normal", 4, 3.0)), start(3, *SHAPE)
    for _ in range(3):
        copies = {
            field.name: value.clone() if isinstance(value, torch.Tensor) else value
            for field in dataclasses.fields(state)
            for value in [getattr(state, field.name)]
        }
        later = sampler.step(state, velocity(state.latents, sampler.sigma(state)))
        for name_, copy in copies.items():
            now = getattr(state, name_)
            assert torch.equal(now, copy) if isinstance(copy, torch.Tensor) else now == copy
        state = later


def test_two_requests_stepped_in_turn_do_not_touch_each_other():
    sigmas = make_sigmas("normal", 6, 3.0)
    alone = [run("dpmpp_2m_sde", sigmas, seed).latents for seed in (1, 2)]
    sampler = Sampler("dpmpp_2m_sde", sigmas)
    states = [start(seed, *SHAPE) for seed in (1, 2)]
    while not sampler.is_finished(states[0]):
        states = [
            sampler.step(state, velocity(state.latents, sampler.sigma(state))) for state in states
        ]
    for state, latents in zip(states, alone, strict=True):
        assert torch.equal(state.latents, latents)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_the_first_noise_is_what_a_seeded_cpu_generator_gives(seed):
    expected = torch.randn((1, *SHAPE), generator=torch.Generator("cpu").manual_seed(seed))
    assert torch.equal(start(seed, *SHAPE).latents, expected[0])


def test_an_unknown_sampler_is_refused_by_name():
    with pytest.raises(InvalidRequest) as caught:
        Sampler("ddim", [1.0, 0.0])
    assert caught.value.field == "sampler"
    assert "dpmpp_2m_sde" in str(caught.value.allowed)


@settings(max_examples=60)
@given(
    name=st.sampled_from(SAMPLERS),
    scheduler=st.sampled_from(SCHEDULERS),
    steps=st.integers(1, 60),
    shift=st.floats(0.05, 20.0),
)
def test_no_schedule_makes_a_run_that_is_not_finite(name, scheduler, steps, shift):
    latents = run(name, make_sigmas(scheduler, steps, shift)).latents
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()
