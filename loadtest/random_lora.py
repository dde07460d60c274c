"""Random LoRAs of a model's shapes that change a velocity visibly."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from deployments.sd3.lora_arena import LowRank
from deployments.sd3.mmdit import Mmdit

LAYERS: Final = {
    "attention": (".attn.", ".attn2."),
    "all": (".attn.", ".attn2.", ".ff.", ".ff_context.", ".norm1.", ".norm1_context."),
}
_STRENGTH = 0.1  # of a branch's output beside its layer's


def random_lora(
    mmdit: Mmdit, rank: int, layers: str, seed: int, strength: float = _STRENGTH
) -> dict[str, LowRank]:
    """Draw a LoRA of a model's shapes on its device, float32.

    Args:
        mmdit: With room for LoRAs.
        rank: Of every layer.
        layers: `attention` or `all`.
        seed: Equal seeds give equal ones on one kind of device.
        strength: Size of what a branch adds, beside an input and a layer's output of unit size.
    """
    assert mmdit.loras is not None
    generator = torch.Generator(mmdit.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=mmdit.device)

    drawn = {}
    for branch in mmdit.loras.branches:
        for stream in branch.of.names:
            for name, columns in zip(stream, branch.of.columns, strict=True):
                if any(part in name for part in LAYERS[layers]):
                    inputs = branch.of.inputs
                    drawn[name] = LowRank(
                        normal(rank, inputs) * inputs**-0.5,
                        normal(columns, rank) * strength * rank**-0.5,
                    )
    return drawn
