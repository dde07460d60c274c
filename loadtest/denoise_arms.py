"""The ways to predict a velocity that are compared: diffusers eager and compiled, and Kelvin."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.sigmas import TRAIN_TIMESTEPS
from loadtest.sd35 import Inputs, random_transformer

ARMS = ("eager", "compiled", "kelvin")


def diffusers_velocity(model: SD3Transformer2DModel, inputs: Inputs) -> Tensor:
    """Predict with diffusers' own forward.

    Returns:
        float32 [rows, C, h, w].
    """
    dtype = model.dtype
    output: Tensor = model(
        hidden_states=inputs.latents.to(dtype),
        timestep=inputs.sigmas * TRAIN_TIMESTEPS,
        encoder_hidden_states=inputs.prompt_embeds.to(dtype),
        pooled_projections=inputs.pooled.to(dtype),
        return_dict=False,
    )[0]
    return output.float()


def with_compiled_blocks(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Return a model over the same weights whose blocks are compiled, each kind of block once."""
    # Dynamo counts what it compiled of a forward over all arms of a process, and gives up at 8:
    # three kinds of block at two sizes of batch are 6 for one arm.
    torch._dynamo.config.recompile_limit = 64
    compiled = copy.copy(model)
    compiled._modules = dict(model._modules)
    blocks: list[Any] = [
        torch.compile(block, fullgraph=True, dynamic=False) for block in model.transformer_blocks
    ]
    compiled.transformer_blocks = nn.ModuleList(blocks)
    return compiled


def diffusers_steps(
    names: tuple[str, ...], model: SD3Transformer2DModel, inputs: Inputs
) -> dict[str, Callable[[], Tensor]]:
    """Return one forward of diffusers for each of `eager` and `compiled` that is named."""
    models = {}
    if "eager" in names:
        models["eager"] = model
    if "compiled" in names:
        models["compiled"] = with_compiled_blocks(model)

    def step_of(arm: SD3Transformer2DModel) -> Callable[[], Tensor]:
        def step() -> Tensor:
            # What diffusers' own pipelines run under.
            with torch.no_grad():
                return diffusers_velocity(arm, inputs)

        return step

    return {name: step_of(arm) for name, arm in models.items()}


def random_kelvin(
    name: str,
    device: torch.device,
    precision: PrecisionChoice,
    inputs: Inputs,
    optimizations: Optimizations | None = None,
) -> Mmdit:
    """Return Kelvin's model of random weights, ready for the shape of the inputs.

    The weights are `random_transformer`'s. Peak memory is counted anew from before it is made
    ready: the bf16 weights that it is made from are no part of serving.
    """
    mmdit = Mmdit.from_diffusers(
        random_transformer(name, device, torch.bfloat16),  # held by nobody else, so given back
        device,
        precision,
        optimizations or Optimizations(),
    )
    forget_garbage(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    mmdit.prepare(*bucket(inputs))
    return mmdit


def kelvin_step(mmdit: Mmdit, inputs: Inputs) -> Callable[[], Tensor]:
    """Return one forward of Kelvin, its inputs in the dtypes that the engine gives it."""
    dtype = mmdit.precision.compute_dtype
    prompt_embeds, pooled = inputs.prompt_embeds.to(dtype), inputs.pooled.to(dtype)
    return lambda: mmdit.velocity(inputs.latents, inputs.sigmas, prompt_embeds, pooled)


def bucket(inputs: Inputs) -> tuple[int, int, int, int]:
    """Return latent height and width, text tokens and rows."""
    rows, _, height, width = inputs.latents.shape
    return height, width, inputs.prompt_embeds.shape[1], rows


def forget_garbage(device: torch.device) -> None:
    """Give back a card's memory that nothing refers to, so that the next arm finds it empty."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, L2 over all elements, taken in float64."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())
