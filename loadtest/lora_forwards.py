"""Forwards whose rows have LoRAs of their own: what they take, and whether they are right."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deployments.sd3.lora_arena import LowRank
from deployments.sd3.lora_layers import PageUse
from deployments.sd3.mmdit import Mmdit
from loadtest.denoise_arms import diffusers_velocity, forget_garbage, relative_error
from loadtest.forward_timing import alternate
from loadtest.random_lora import random_lora
from loadtest.sd35 import Inputs, random_transformer


@dataclass(frozen=True)
class Placed:
    """One LoRA, and the pages that hold it."""

    layers: dict[str, LowRank]
    pages: tuple[int, ...]

    def uses(self, weight: float = 1.0) -> tuple[PageUse, ...]:
        """Return what adapts a row with it."""
        return tuple((page, weight) for page in self.pages)


def place(mmdit: Mmdit, rank: int, layers: str, count: int) -> tuple[list[Placed], float]:
    """Put LoRAs into the model's pages; returns the median milliseconds of a page's copy too."""
    assert mmdit.loras is not None
    placed, took, page = [], [], 0
    for seed in range(count):
        drawn = random_lora(mmdit, rank, layers, seed)
        pages = []
        for content in mmdit.loras.pack(drawn):
            began = time.perf_counter()
            mmdit.loras.write(page, content)
            took.append(1000 * (time.perf_counter() - began))
            pages.append(page)
            page += 1
        placed.append(Placed(drawn, tuple(pages)))
    return placed, statistics.median(took)


def timed_forwards(
    mmdit: Mmdit, inputs: Inputs, placed: Sequence[Placed], count: int
) -> dict[str, Any]:
    """Time forwards without LoRAs, with one in every row and with one in one row, in turns.

    Args:
        mmdit: That has them.
        inputs: Of all rows of a forward.
        placed: LoRAs, of which each two rows have the next.
        count: Timed forwards of each kind.
    """
    rows = len(inputs.latents)
    # A request's two rows have the same.
    uses = [placed[(row // 2) % len(placed)].uses() for row in range(rows)]
    one_row_only = [uses[0], *[()] * (rows - 1)]
    took = alternate(
        {
            "without": _step(mmdit, inputs, ()),
            "with": _step(mmdit, inputs, uses),
            "one_row": _step(mmdit, inputs, one_row_only),
        },
        count,
        3,
        mmdit.device,
    )
    medians = {name: statistics.median(each) for name, each in took.items()}
    side, text = inputs.latents.shape[2], inputs.prompt_embeds.shape[1]
    return {
        **{f"{name}_ms": median for name, median in medians.items()},
        "ratio": medians["with"] / medians["without"],
        "ratio_where_one_row_is_adapted": medians["one_row"] / medians["without"],
        "path": mmdit.path(side, side, text, rows, True),
    }


def accuracy(
    mmdit: Mmdit,
    inputs: Inputs,
    placed: Sequence[Placed],
    exact: Tensor,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Compare rows of a mixed batch with the same rows alone, and with weights that were fused."""
    rows = min(max(options.rows), 2 * len(placed))
    uses = [placed[row // 2].uses() for row in range(rows)]
    mixed = _step(mmdit, rows_of(inputs, 0, rows), uses)()
    plain = _step(mmdit, rows_of(inputs, 0, 2), ())()
    alone = [
        _step(mmdit, rows_of(inputs, begin, begin + 2), uses[begin : begin + 2])()
        for begin in range(0, rows, 2)
    ]
    device = mmdit.device
    fused = random_transformer(options.model, device, torch.bfloat16)
    modules = dict(fused.named_modules())
    with torch.no_grad():
        for name, layer in placed[0].layers.items():
            weight: Any = modules[name].weight
            weight.copy_((weight.float() + layer.up @ layer.down).to(weight.dtype))
        expected = diffusers_velocity(fused, rows_of(inputs, 0, 2)).cpu()
    del fused, modules
    forget_garbage(device)
    own_error = relative_error(plain, exact)
    differences = [
        relative_error(mixed[2 * at : 2 * at + 2], each) for at, each in enumerate(alone)
    ]
    return {
        "effect": relative_error(alone[0], plain),
        "mixed_against_alone": max(differences),
        "own_error_without_loras": own_error,
        "against_fused_bf16": relative_error(alone[0], expected),
        "finite": bool(torch.isfinite(mixed).all()),
    }


def rows_of(inputs: Inputs, begin: int, end: int) -> Inputs:
    """Return some of the rows of a forward's inputs."""
    return Inputs(
        inputs.latents[begin:end],
        inputs.sigmas[begin:end],
        inputs.prompt_embeds[begin:end],
        inputs.pooled[begin:end],
    )


def _step(mmdit: Mmdit, inputs: Inputs, uses: Sequence[Sequence[PageUse]]) -> Callable[[], Tensor]:
    dtype = mmdit.precision.compute_dtype
    embeds, pooled = inputs.prompt_embeds.to(dtype), inputs.pooled.to(dtype)
    return lambda: mmdit.velocity(inputs.latents, inputs.sigmas, embeds, pooled, uses)
