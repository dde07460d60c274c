"""One step at a time: velocity in, latents out; everything a request is lies in its state.

A state can leave one process and go on in another, and no object is shared between requests.
Velocities are what flow models predict: `x = (1 - sigma) * image + sigma * noise`, and
`velocity = noise - image`, so `denoised = x - sigma * velocity`.

Sources: k-diffusion and ComfyUI `comfy/k_diffusion/sampling.py` (sample_euler,
sample_euler_ancestral_RF with eta 1 and s_noise 1, sample_dpmpp_2m, sample_dpmpp_2m_sde with eta 1
and midpoint). From pure noise, where log(alpha / sigma) has no end, dpmpp_2m_sde takes the limit,
as diffusers does; ComfyUI moves the first noise level down to that of 0.01 % of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.sd3.noise import initial_latents, request_generator
from serve.errors import InvalidRequest


@dataclass(frozen=True)
class SamplerState:
    """A request between two steps."""

    latents: Tensor  # float32 [C, h, w]
    step: int  # steps finished
    previous: Tensor | None  # float32 [C, h, w], denoised of the step before; multistep only
    generator: Tensor  # uint8, state of the request's CPU generator


def start(seed: int, channels: int, height: int, width: int) -> SamplerState:
    """Return the state before the first step: pure noise from the seed, on the CPU.

    Args:
        seed: Of the picture.
        channels: Of the latents.
        height: Of the latents (pixels / 8).
        width: Of the latents.
    """
    generator = request_generator(seed)
    latents = initial_latents(generator, channels, height, width)
    return SamplerState(latents, 0, None, generator.get_state())


def start_from_image(seed: int, mean: Tensor, std: Tensor, sigma: float) -> SamplerState:
    """Return the state of image-to-image before its first step, on the CPU.

    The image's latents are drawn first and the noise second, as diffusers'
    StableDiffusion3Img2ImgPipeline.prepare_latents draws them; mixed as its
    FlowMatchEulerDiscreteScheduler.scale_noise does.

    Args:
        seed: Of the picture.
        mean: float32 [C, h, w], of the encoded image.
        std: As mean.
        sigma: The noise level that the run begins at.
    """
    generator = request_generator(seed)
    image = mean + std * initial_latents(generator, *mean.shape)
    noise = initial_latents(generator, *mean.shape)
    return SamplerState(sigma * noise + (1 - sigma) * image, 0, None, generator.get_state())


class Sampler:
    """Steps a state along its noise levels; holds nothing that changes.

    Args:
        name: `euler`, `euler_ancestral`, `dpmpp_2m` or `dpmpp_2m_sde`.
        sigmas: [steps + 1], strictly falling to 0.

    Raises:
        InvalidRequest: Unknown name.
    """

    def __init__(self, name: str, sigmas: Iterable[float]) -> None:
        if name not in _STEPS:
            raise InvalidRequest(
                f"Unknown sampler {name!r}.",
                field="sampler",
                value=name,
                allowed="one of: " + ", ".join(_STEPS),
            )
        self.name = name
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        self._step = _STEPS[name]

    @property
    def steps(self) -> int:
        """Steps in all."""
        return len(self.sigmas) - 1

    def sigma(self, state: SamplerState) -> float:
        """Return the noise level at which the next velocity is wanted."""
        return self.sigmas[state.step]

    def is_finished(self, state: SamplerState) -> bool:
        """True when no step is left."""
        return state.step >= self.steps

    def step(self, state: SamplerState, velocity: Tensor) -> SamplerState:
        """Take one step.

        Args:
            state: Not finished; left as it is.
            velocity: [C, h, w], any float dtype, on the device of the latents; with guidance
                already applied.
        """
        return self._step(self.sigmas, state, velocity.float())


def _euler(sigmas: Sequence[float], state: SamplerState, velocity: Tensor) -> SamplerState:
    # The difference in float32, as diffusers takes it.
    sigma, sigma_next = torch.tensor(sigmas[state.step : state.step + 2]).unbind()
    latents = state.latents + (sigma_next - sigma).item() * velocity
    return SamplerState(latents, state.step + 1, None, state.generator)


def _euler_ancestral(
    sigmas: Sequence[float], state: SamplerState, velocity: Tensor
) -> SamplerState:
    # Down to a level below the next one and back up with fresh noise, such that image and noise
    # are mixed as the next level says. The plain formula would mix as if the image kept its size.
    sigma, sigma_next = sigmas[state.step], sigmas[state.step + 1]
    denoised = state.latents - sigma * velocity
    if sigma_next == 0:
        return SamplerState(denoised, state.step + 1, None, state.generator)
    down_ratio = (sigma_next / sigma) ** 2
    sigma_down = sigma * down_ratio
    scale = (1 - sigma_next) / (1 - sigma_down)
    latents = (scale * down_ratio) * state.latents + (scale * (1 - down_ratio)) * denoised
    noise, generator = _fresh_noise(state)
    latents = latents + math.sqrt(max(0.0, sigma_next**2 - (scale * sigma_down) ** 2)) * noise
    return SamplerState(latents, state.step + 1, None, generator)


def _dpmpp_2m(sigmas: Sequence[float], state: SamplerState, velocity: Tensor) -> SamplerState:
    # lambda = -log(sigma), as ComfyUI has it for every model; diffusers uses log(alpha / sigma).
    sigma, sigma_next = sigmas[state.step], sigmas[state.step + 1]
    denoised = state.latents - sigma * velocity
    direction = denoised
    if state.previous is not None and sigma_next > 0:
        h = math.log(sigma / sigma_next)
        h_last = math.log(sigmas[state.step - 1] / sigma)
        half_inverse_r = h / (2 * h_last)
        direction = (1 + half_inverse_r) * denoised - half_inverse_r * state.previous
    ratio = sigma_next / sigma
    latents = ratio * state.latents + (1 - ratio) * direction
    return SamplerState(latents, state.step + 1, denoised, state.generator)


def _dpmpp_2m_sde(sigmas: Sequence[float], state: SamplerState, velocity: Tensor) -> SamplerState:
    # lambda = log(alpha / sigma) with alpha = 1 - sigma. Written with exp(-h), which is 0 where
    # the run starts from pure noise (alpha 0), so that no infinity appears.
    sigma, sigma_next = sigmas[state.step], sigmas[state.step + 1]
    denoised = state.latents - sigma * velocity
    if sigma_next == 0:
        return SamplerState(denoised, state.step + 1, denoised, state.generator)
    alpha, alpha_next = 1 - sigma, 1 - sigma_next
    exp_minus_h = (sigma_next * alpha) / (alpha_next * sigma)
    gain = alpha_next * (1 - exp_minus_h**2)
    latents = (sigma_next / sigma) * exp_minus_h * state.latents + gain * denoised
    if state.previous is not None and (alpha_before := 1 - sigmas[state.step - 1]) > 0:
        h_last = math.log((alpha * sigmas[state.step - 1]) / (alpha_before * sigma))
        inverse_r = -math.log(exp_minus_h) / h_last
        latents = latents + (0.5 * gain * inverse_r) * (denoised - state.previous)
    noise, generator = _fresh_noise(state)
    latents = latents + sigma_next * math.sqrt(1 - exp_minus_h**2) * noise
    return SamplerState(latents, state.step + 1, denoised, generator)


def _fresh_noise(state: SamplerState) -> tuple[Tensor, Tensor]:
    """Return noise of the latents' shape, on their device, and the generator's state after it."""
    generator = torch.Generator("cpu")
    generator.set_state(state.generator)
    latents = state.latents
    # From pinned memory the host need not wait for the copy.
    noise = torch.randn(
        (1, *latents.shape), generator=generator, pin_memory=latents.device.type == "cuda"
    )[0].to(latents.device, non_blocking=True)
    return noise, generator.get_state()


_STEPS: dict[str, Callable[[Sequence[float], SamplerState, Tensor], SamplerState]] = {
    "euler": _euler,
    "euler_ancestral": _euler_ancestral,
    "dpmpp_2m": _dpmpp_2m,
    "dpmpp_2m_sde": _dpmpp_2m_sde,
}

HAS_HISTORY = frozenset({"dpmpp_2m", "dpmpp_2m_sde"})
"""Samplers whose state has `previous` from the first step on."""
