"""Which models fidelity is measured on: random weights at real depth, and the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from deployments.payloads import TextJob
from deployments.sd3.checkpoint import load_component
from deployments.sd3.fp8 import LARGEST_E4M3, dequantize, quantize_per_channel
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import PrecisionChoice, choose_precision
from deployments.sd3.stored_tensors import read_json
from deployments.sd3.text import TextEncoders
from deployments.sd3.wire import from_wire
from loadtest.command_line import check_side
from loadtest.denoise_arms import diffusers_velocity
from loadtest.sd35 import MODELS as RANDOM_MODELS
from loadtest.sd35 import Inputs, config, largest_side, random_inputs, random_transformer
from loadtest.trials import held_out_prompts
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec
from serve.requests import GenerateRequest

MODELS = ("builtin", *RANDOM_MODELS)

_RANDOM_SIZE = 512
_TINY_SIZE = 64


class Subject(Protocol):
    """A model that can be had in every way of computing it, and inputs for it."""

    def diffusers(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        """Return diffusers' module with the weights as stored, in a dtype."""

    def kelvin(self, precision: PrecisionChoice) -> Mmdit:
        """Return Kelvin's model of the same weights."""

    def cases(self, seeds: int, sigmas: int, size: int | None) -> list[Inputs]:
        """Return inputs: for each seed one row at each noise level 1/n, 2/n, ..., 1."""


def subject_of(name: str, device: torch.device) -> Subject:
    """Return the subject of a name in MODELS."""
    return _Builtin(device) if name == "builtin" else _Random(name, device)


@torch.no_grad()
def quantise_linears_alone(model: SD3Transformer2DModel) -> None:
    """Round weights and inputs of the blocks' Linears to E4M3 and leave all else as it is.

    Weights by output channel and inputs by row, as Kelvin does, then multiplied in the dtype of the
    module: what is lost is the rounding and nothing else.
    """
    for module in model.transformer_blocks.modules():
        if isinstance(module, nn.Linear):
            weight, scale = quantize_per_channel(module.weight)
            module.weight.copy_(dequantize(weight, scale, module.weight.dtype))
            module.register_forward_pre_hook(_round_inputs)


def _round_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values = arguments[0]
    # Written out rather than taken from the serving code: a yardstick shares nothing with it.
    largest = values.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST_E4M3, torch.ones_like(largest))
    codes = (values / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return (codes.to(values.dtype) * scale, *arguments[1:])


class _Random:
    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device

    def diffusers(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        return random_transformer(self.name, self.device, dtype)

    def kelvin(self, precision: PrecisionChoice) -> Mmdit:
        # As a checkpoint holds them; FP8 is made from that.
        model = random_transformer(self.name, self.device, torch.bfloat16)
        return Mmdit.from_diffusers(model, self.device, precision)

    def cases(self, seeds: int, sigmas: int, size: int | None) -> list[Inputs]:
        pixels = size or (_TINY_SIZE if self.name.startswith("tiny") else _RANDOM_SIZE)
        check_side(pixels, largest_side(self.name))
        side = pixels // 8
        cases = []
        for seed in range(seeds):
            rows = random_inputs(config(self.name), sigmas, side, side, self.device, seed=seed + 1)
            levels = _levels(sigmas, self.device)
            cases.append(Inputs(rows.latents, levels, rows.prompt_embeds, rows.pooled))
        return cases


class _Builtin:
    """Trained weights on what they meet: prompts of its world, latents on the way to pictures."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.model_dir: Path = resolve_model_dir(ModelSettings(path="builtin"))
        self.spec = ModelSpec.from_directory(self.model_dir, None)
        self.defaults = self.spec.defaults

    def diffusers(self, dtype: torch.dtype) -> SD3Transformer2DModel:
        folder = self.model_dir / "transformer"
        settings: dict[str, Any] = read_json(folder / "config.json")
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]

        def build() -> SD3Transformer2DModel:
            with torch.device("meta"):
                return SD3Transformer2DModel.from_config(settings)

        precision = choose_precision(name, self.device)
        return load_component(folder, build, self.device, precision)

    def kelvin(self, precision: PrecisionChoice) -> Mmdit:
        return Mmdit.load(self.model_dir, self.device, precision)

    @torch.no_grad()
    def cases(self, seeds: int, sigmas: int, size: int | None) -> list[Inputs]:
        # The model's own limits, refused as a request would be.
        self.spec.resolve(GenerateRequest(prompt="a", width=size, height=size))
        side = (size or self.defaults.width) // 8
        precision = choose_precision("fp32", self.device)
        text = TextEncoders.load(self.model_dir, self.device, precision)
        length = self.defaults.max_sequence_length
        prompts = [example.prompt for _, example in held_out_prompts(seeds, 1, 8 * side, 8 * side)]
        encoded = text.encode([TextJob(p, p, p, length) for p in prompts])
        model = self.diffusers(torch.float32)
        cases = []
        for seed, prompt in enumerate(encoded):
            embeds, pooled = (
                from_wire(array, self.device, torch.float32)[None]
                for array in (prompt.prompt_embeds, prompt.pooled_prompt_embeds)
            )
            latents = self._on_the_way(model, embeds, pooled, sigmas, side, seed)
            cases.append(
                Inputs(
                    latents,
                    _levels(sigmas, self.device),
                    embeds.expand(sigmas, -1, -1),
                    pooled.expand(sigmas, -1),
                )
            )
        return cases

    def _on_the_way(
        self,
        model: SD3Transformer2DModel,
        embeds: Tensor,
        pooled: Tensor,
        sigmas: int,
        side: int,
        seed: int,
    ) -> Tensor:
        """Sample from noise by Euler steps in float32; return the latents met at each level."""
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (1, int(model.config.in_channels), side, side)
        latents = torch.randn(shape, generator=generator).to(self.device)
        met = []
        for level in _levels(sigmas, self.device).flip(0):
            met.append(latents)
            velocity = diffusers_velocity(model, Inputs(latents, level[None], embeds, pooled))
            latents = latents - velocity / sigmas
        return torch.cat(met[::-1])


def _levels(number: int, device: torch.device) -> Tensor:
    """1/n, 2/n, ..., 1: float32 [n]."""
    return torch.arange(1, number + 1, device=device) / number
