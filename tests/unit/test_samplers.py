"""Samplers against diffusers and ComfyUI's formulas; and a state that can stop and go on."""

import dataclasses
import io
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load, save

from deployments.sd3.noise import request_generator
from deployments.sd3.samplers import Sampler, SamplerState, start
from deployments.sd3.sigmas import make_sigmas
from serve import requests
from serve.errors import InvalidRequest

SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde")
SCHEDULERS = ("normal", "simple", "sgm_uniform", "beta")
SHAPE = (4, 6, 5)


def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth made-up model: something that bends, and depends on the noise level."""
    return torch.tanh(latents * 1.3 + sigma) + 0.3 * latents


def run(name: str, sigmas: Sequence[float] | NDArray[np.float32], seed: int = 3) -> SamplerState:
    sampler = Sampler(name, sigmas)
    state = start(seed, *SHAPE)
    while not sampler.is_finished(state):
        state = advance(sampler, state)
    return state


def advance(sampler: Sampler, state: SamplerState) -> SamplerState:
    return sampler.step(state, velocity(state.latents, sampler.sigma(state)))


def sigma_fn(t: torch.Tensor) -> torch.Tensor:
    return t.neg().exp()


def t_fn(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.log().neg()


def comfy_dpmpp_2m(x: torch.Tensor, sigmas: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
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


def first_noise(seed: int = 3) -> tuple[torch.Tensor, torch.Generator]:
    """What a run starts from, and the generator that its later noise comes from."""
    generator = request_generator(seed)
    return torch.randn((1, *SHAPE), generator=generator)[0], generator


def comfy_euler(x: torch.Tensor, sigmas: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    for i in range(len(sigmas) - 1):
        denoised = x - sigmas[i] * velocity(x, float(sigmas[i]))
        d = (x - denoised) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def comfy_euler_ancestral_rf(
    x: torch.Tensor, sigmas: torch.Tensor, noise: torch.Generator, eta: float = 1.0
) -> torch.Tensor:
    for i in range(len(sigmas) - 1):
        denoised = x - sigmas[i] * velocity(x, float(sigmas[i]))
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        downstep_ratio = 1 + (sigmas[i + 1] / sigmas[i] - 1) * eta
        sigma_down = sigmas[i + 1] * downstep_ratio
        alpha_ip1, alpha_down = 1 - sigmas[i + 1], 1 - sigma_down
        renoise_coeff = (sigmas[i + 1] ** 2 - sigma_down**2 * alpha_ip1**2 / alpha_down**2) ** 0.5
        sigma_down_i_ratio = sigma_down / sigmas[i]
        x = sigma_down_i_ratio * x + (1 - sigma_down_i_ratio) * denoised
        drawn = torch.randn(x.shape, generator=noise)
        x = (alpha_ip1 / alpha_down) * x + drawn * renoise_coeff
    return x


def comfy_dpmpp_2m_sde(
    x: torch.Tensor, sigmas: torch.Tensor, noise: torch.Generator, eta: float = 1.0
) -> torch.Tensor:
    """With the half-logSNR of flow models, logit(sigma).neg(); midpoint."""
    old_denoised, h, h_last = None, None, None
    for i in range(len(sigmas) - 1):
        denoised = x - sigmas[i] * velocity(x, float(sigmas[i]))
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            lambda_s, lambda_t = sigmas[i].logit().neg(), sigmas[i + 1].logit().neg()
            h = lambda_t - lambda_s
            h_eta = h * (eta + 1)
            alpha_t = sigmas[i + 1] * lambda_t.exp()
            gain = alpha_t * (-h_eta).expm1().neg()
            x = sigmas[i + 1] / sigmas[i] * (-h * eta).exp() * x + gain * denoised
            if old_denoised is not None and h_last is not None:
                r = h_last / h
                x = x + 0.5 * gain * (1 / r) * (denoised - old_denoised)
            drawn = torch.randn(x.shape, generator=noise)
            x = x + drawn * sigmas[i + 1] * (-2 * h * eta).expm1().neg().sqrt()
        old_denoised, h_last = denoised, h
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


FORMULAS = {
    "euler": comfy_euler,
    "euler_ancestral": comfy_euler_ancestral_rf,
    "dpmpp_2m": comfy_dpmpp_2m,
    "dpmpp_2m_sde": comfy_dpmpp_2m_sde,
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 40])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_comfyuis_formula(name, scheduler, steps, shift):
    sigmas = make_sigmas(scheduler, steps, shift)
    if name == "dpmpp_2m_sde":
        # From a level of 1 its formula divides by zero: that start is diffusers' below.
        sigmas = sigmas[sigmas < 1]
    x, noise = first_noise()
    # The formulas in double precision, so that what is left is our own rounding.
    reference = FORMULAS[name](x.double(), torch.from_numpy(sigmas).double(), noise)
    close(run(name, sigmas).latents.double(), reference, 1e-5)


def test_dpmpp_2m_sde_from_pure_noise_is_near_to_what_comfyui_moves_the_start_to():
    sigmas = make_sigmas("normal", 20, 3.0)
    moved = torch.from_numpy(sigmas).double()
    moved[0] = 3.0 * (1 - 1e-4) / (1 + (3.0 - 1) * (1 - 1e-4))  # percent_to_sigma(1e-4)
    x, noise = first_noise()
    ours = run("dpmpp_2m_sde", sigmas).latents.double()
    close(ours, comfy_dpmpp_2m_sde(x.double(), moved, noise), 0.02)


def test_euler_ancestral_keeps_the_mixture_that_each_level_states():
    """With an exact model latents are (1 - sigma) * image + sigma * noise at every level."""
    image = torch.full((4, 64, 64), 0.7)
    sampler = Sampler("euler_ancestral", make_sigmas("normal", 8, 3.0))
    state = start(0, *image.shape)
    while not sampler.is_finished(state):
        sigma = sampler.sigma(state)
        state = sampler.step(state, (state.latents - image) / sigma)
        level = sampler.sigmas[state.step]
        noise = state.latents - (1 - level) * image
        assert noise.mean().item() == pytest.approx(0, abs=0.04)
        assert noise.std().item() == pytest.approx(level, rel=0.03, abs=1e-6)


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


def travelled(state: SamplerState) -> SamplerState:
    """A state as it arrives elsewhere: through bytes."""
    tensors = {
        field.name: value
        for field in dataclasses.fields(state)
        if (value := getattr(state, field.name)) is not None and field.name != "step"
    }
    sent = io.BytesIO(save({**tensors, "step": torch.tensor(state.step)}))
    arrived = load(sent.getvalue())
    return SamplerState(
        latents=arrived["latents"],
        step=int(arrived["step"]),
        previous=arrived.get("previous"),
        generator=arrived["generator"],
    )


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(SAMPLERS),
    scheduler=st.sampled_from(SCHEDULERS),
    steps=st.integers(1, 20),
    seed=st.integers(0, 2**64 - 1),
    stops=st.sets(st.integers(0, 20), max_size=4),
)
def test_a_run_resumed_elsewhere_ends_in_the_same_bytes(name, scheduler, steps, seed, stops):
    sigmas = make_sigmas(scheduler, steps, 3.0)
    whole = run(name, sigmas, seed).latents
    state = start(seed, *SHAPE)
    while not Sampler(name, sigmas).is_finished(state):
        if state.step in stops:
            state = travelled(state)
        state = advance(Sampler(name, sigmas), state)
    assert torch.equal(state.latents, whole)


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from(SAMPLERS),
            st.sampled_from(SCHEDULERS),
            st.integers(1, 8),
            st.integers(0, 3),
        ),
        min_size=2,
        max_size=5,
    ),
    order=st.randoms(use_true_random=False),
)
def test_requests_stepped_in_any_order_end_as_they_do_alone(runs, order):
    alone = [run(name, make_sigmas(by, steps, 3.0), seed) for name, by, steps, seed in runs]
    samplers = [Sampler(name, make_sigmas(by, steps, 3.0)) for name, by, steps, _ in runs]
    states = [start(seed, *SHAPE) for *_, seed in runs]
    while unfinished := [
        at for at, sampler in enumerate(samplers) if not sampler.is_finished(states[at])
    ]:
        at = order.choice(unfinished)
        states[at] = advance(samplers[at], states[at])
    for state, expected in zip(states, alone, strict=True):
        assert torch.equal(state.latents, expected.latents)
        assert torch.equal(state.generator, expected.generator)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_noise_is_the_requests_own_and_nothing_else_draws_from_it(name):
    sigmas = make_sigmas("normal", 6, 3.0)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = run(name, sigmas, seed=1).latents
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(run(name, sigmas, seed=1).latents, first)
    assert not torch.equal(run(name, sigmas, seed=2).latents, first)


@pytest.mark.parametrize("name", SAMPLERS)
def test_stepping_leaves_the_state_it_was_given_alone(name):
    sampler, state = Sampler(name, make_sigmas("normal", 4, 3.0)), start(3, *SHAPE)
    for _ in range(3):
        copies = {
            field.name: value.clone() if isinstance(value, torch.Tensor) else value
            for field in dataclasses.fields(state)
            for value in [getattr(state, field.name)]
        }
        later = advance(sampler, state)
        for name_, copy in copies.items():
            now = getattr(state, name_)
            assert torch.equal(now, copy) if isinstance(copy, torch.Tensor) else now == copy
        state = later


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_the_first_noise_is_what_a_seeded_cpu_generator_gives(seed):
    expected = torch.randn((1, *SHAPE), generator=torch.Generator("cpu").manual_seed(seed))
    assert torch.equal(start(seed, *SHAPE).latents, expected[0])


def test_an_unknown_sampler_is_refused_by_name():
    with pytest.raises(InvalidRequest) as caught:
        Sampler("ddim", [1.0, 0.0])
    assert caught.value.field == "sampler"
    assert all(name in str(caught.value.allowed) for name in SAMPLERS)


def test_requests_name_the_samplers_and_schedulers_there_are():
    fields = requests.GenerateRequest.allowed()
    assert get_args(requests.Sampler) == SAMPLERS
    assert get_args(requests.Scheduler) == SCHEDULERS
    assert fields["sampler"] == "one of: " + ", ".join(SAMPLERS)
    assert fields["scheduler"] == "one of: " + ", ".join(SCHEDULERS)


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
