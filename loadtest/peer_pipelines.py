"""diffusers' SD3 pipeline as peers of Kelvin run it: plain, compiled, and quantised by torchao.

Plain is what Ray's own tutorial serves: one call, one picture. Compiled, its blocks and decoder are
`torch.compile`d and a call makes as many pictures as `serve.batch` has gathered.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from loadtest.denoise_arms import with_compiled_blocks
from loadtest.peer_settings import PictureAsked

Picture = NDArray[np.uint8]


class DiffusersArm:
    """One way of running the pipeline; makes pictures in the order they are asked for.

    Args:
        pipeline: Loaded, on its device.
        batch: Pictures in one call; with 1 each is a call of its own.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, batch: int = 1) -> None:
        self._pipeline = pipeline
        self._pipeline.set_progress_bar_config(disable=True)
        self.batch = batch

    @property
    def weights_bytes(self) -> int:
        """Of all its models, whoever else holds them."""
        parts = self._pipeline.components.values()
        return sum(held_bytes(part) for part in parts if isinstance(part, nn.Module))

    def make(self, asked: Sequence[PictureAsked]) -> list[Picture]:
        """Make pictures of one size, steps and guidance; uint8 [height, width, 3] each."""
        made: list[Picture] = []
        for begin in range(0, len(asked), self.batch):
            made += call(self._pipeline, asked[begin : begin + self.batch])
        return made

    def close(self) -> None:
        """Let go of everything."""
        del self._pipeline


def call(pipeline: StableDiffusion3Pipeline, asked: Sequence[PictureAsked]) -> list[Picture]:
    """Make pictures in one call of a pipeline.

    Args:
        pipeline: Loaded.
        asked: Of one size, number of steps and guidance scale.

    Returns:
        uint8 [height, width, 3] each.
    """
    first = asked[0]
    output = pipeline(
        prompt=[each.prompt for each in asked],
        negative_prompt=[""] * len(asked),
        width=first.side,
        height=first.side,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        max_sequence_length=first.max_sequence_length,
        generator=[torch.Generator().manual_seed(each.seed) for each in asked],
        output_type="np",
    )
    return list((output.images * 255).round().astype(np.uint8))


def assembled(transformer: nn.Module, models: dict[str, Any], shift: float = 3.0) -> Any:
    """Return a pipeline over loaded models.

    Args:
        transformer: diffusers' own.
        models: The other arguments of `StableDiffusion3Pipeline`, but for the scheduler.
        shift: Of the schedule.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    return StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **models)


def compiled(
    pipeline: StableDiffusion3Pipeline, *, decoder: bool = True
) -> StableDiffusion3Pipeline:
    """Return a pipeline over the same weights whose blocks and decoder are compiled.

    Each kind of block is compiled once for each size of batch it meets, as diffusers'
    `compile_repeated_blocks` does; whole, the model takes minutes and is no faster on a full card.

    Args:
        pipeline: Loaded.
        decoder: Whether the VAE's decoder is compiled, too.
    """
    vae = pipeline.vae
    if decoder:
        vae = copy.copy(pipeline.vae)
        vae._modules = dict(pipeline.vae._modules)
        vae.decoder = torch.compile(pipeline.vae.decoder, dynamic=False)
    models = {name: part for name, part in pipeline.components.items() if name != "transformer"}
    return StableDiffusion3Pipeline(
        transformer=with_compiled_blocks(pipeline.transformer), **(models | {"vae": vae})
    )


def quantise_by_torchao(transformer: nn.Module) -> None:
    """Give the blocks' Linears FP8 weights by channel and FP8 inputs by row, chosen as they come.

    torchao would also have Inductor search every kernel's settings step by step, in all directions.
    On an H200 that took 174 s for the first of Medium's three kinds of block at one size of batch,
    which without takes 5, and it would hold for the arms compiled after it.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    fp8 = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(transformer.transformer_blocks, fp8)


def held_bytes(module: nn.Module) -> int:
    """Return the memory that a model's tensors take, each storage counted once.

    torchao's tensors hold others, and have neither storage nor size of their own.
    """
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
        for part in _plain(tensor)
    }
    return sum(storages.values())


def _plain(tensor: Tensor) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]
