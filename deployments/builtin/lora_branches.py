"""A LoRA on the transformer's blocks: side branches to train, and the file that diffusers reads.

The branch of a Linear ``W`` is ``B A`` of a small rank (Hu et al., 2021), with alpha equal to the
rank, so that its scale is one. Which Linears of the attention have one, how they begin and how the
file is written are those of diffusers' ``train_dreambooth_lora_sd3``.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_PREFIX = "transformer."
# Of the last block's prompt nothing is read but keys and values.
_NOT_IN_THE_LAST = {"attn.add_q_proj", "attn.to_add_out", *FEED_FORWARD[2:]}


class LoraLinear(nn.Module):
    """A frozen Linear and its side branch, which begins at zero.

    Attributes:
        lora_A: float32 [rank, in].
        lora_B: float32 [out, rank].
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        branch = functional.linear(functional.linear(rows, self.lora_A), self.lora_B)
        result: torch.Tensor = self.linear(rows) + branch
        return result


def add_branches(
    transformer: SD3Transformer2DModel, rank: int, targets: Sequence[str] = ATTENTION
) -> dict[str, LoraLinear]:
    """Give the targeted Linears of every block a branch, and freeze all else.

    Args:
        transformer: its Linears are replaced.
        rank: of every branch.
        targets: names within a block; what the last block lacks has none there.

    Returns:
        The branches by the name of their Linear, in the order of the blocks.
    """
    transformer.requires_grad_(False)
    branches: dict[str, LoraLinear] = {}
    for index, block in enumerate(transformer.transformer_blocks):
        for target in targets:
            if block.context_pre_only and target in _NOT_IN_THE_LAST:
                continue
            path = f"transformer_blocks.{index}.{target}"
            parent, _, name = path.rpartition(".")
            branches[path] = LoraLinear(transformer.get_submodule(path), rank)
            setattr(transformer.get_submodule(parent), name, branches[path])
    return branches


def save_lora(path: Path, branches: dict[str, LoraLinear]) -> None:
    """Write the branches as float16, in diffusers' own names, by its own writer.

    Args:
        path: of the file; its folder is made.
        branches: of ``add_branches``.
    """
    layers: dict[str, torch.Tensor] = {}
    for name, branch in branches.items():
        layers[f"{name}.lora_A.weight"] = branch.lora_A.detach().to("cpu", torch.float16)
        layers[f"{name}.lora_B.weight"] = branch.lora_B.detach().to("cpu", torch.float16)
    rank = next(iter(branches.values())).lora_A.shape[0]
    StableDiffusion3Pipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=layers,
        weight_name=path.name,
        transformer_lora_adapter_metadata={
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({name.split(".", 2)[2] for name in branches}),
        },
    )


@torch.no_grad()
def load_branches(path: Path, branches: dict[str, LoraLinear]) -> None:
    """Give branches what a file of ``save_lora`` holds for them.

    Raises:
        KeyError: the file lacks a branch.
        RuntimeError: it is of another rank.
    """
    stored = load_file(path)
    for name, branch in branches.items():
        branch.lora_A.copy_(stored[f"{_PREFIX}{name}.lora_A.weight"])
        branch.lora_B.copy_(stored[f"{_PREFIX}{name}.lora_B.weight"])
