"""SD3.5's transformers at their real sizes with random weights: speed needs no others.

The weights are what a bf16 checkpoint would hold: drawn in float32, rounded to bfloat16, then held
in whatever dtype is asked for. So models of one seed and device are the same model in each dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

TEXT_TOKENS = 333
"""Of a prompt as served: 77 of the CLIPs and 256 of T5."""

_COMMON: dict[str, Any] = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "qk_norm": "rms_norm",
    "sample_size": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "dual_attention_layers": (),
}
_LARGE = _COMMON | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
_MEDIUM = _COMMON | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
_TINY = _COMMON | {
    "num_layers": 3,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "pos_embed_max_size": 32,
    "sample_size": 32,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 48,
}
_CONFIGS = {
    "large": _LARGE,
    "medium": _MEDIUM,
    "tiny": _TINY,
    "tiny-dual": _TINY | {"dual_attention_layers": (0, 1)},
}
MODELS = tuple(_CONFIGS)


@dataclass(frozen=True)
class Inputs:
    """What one forward takes."""

    latents: Tensor  # float32 [rows, C, h, w]
    sigmas: Tensor  # float32 [rows]
    prompt_embeds: Tensor  # [rows, tokens, joint_attention_dim]
    pooled: Tensor  # [rows, pooled_projection_dim]


def config(name: str) -> dict[str, Any]:
    """Return the arguments of diffusers' `SD3Transformer2DModel`.

    Args:
        name: `large` or `medium` as published; `tiny` and `tiny-dual` (Medium's second attention)
            for tests.

    Raises:
        KeyError: Another name.
    """
    return dict(_CONFIGS[name])


def largest_side(name: str) -> int:
    """Return the side of the model's table of positions, in latents."""
    return int(_CONFIGS[name]["pos_embed_max_size"]) * int(_CONFIGS[name]["patch_size"])


@torch.no_grad()
def random_transformer(
    name: str, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> SD3Transformer2DModel:
    """Build a transformer on a device, filled there; no copy on the host ever exists.

    Matrices keep the size of what passes through them, so activations stay sane at full depth, and
    nothing is zero: a part that is left out shows.

    Args:
        name: As `config` takes it.
        device: Where it is made.
        dtype: Of all its tensors.
        seed: Equal seeds give equal weights on one kind of device, whatever the dtype.

    Returns:
        In eval mode, without gradients.
    """
    model = empty_transformer(name)
    nn.Module.to(model, dtype)  # diffusers' own warns of modules to keep in float32: SD3 has none
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for full_name, parameter in model.named_parameters():
        parameter.copy_(random_values(full_name, parameter.shape, generator))
    model.pos_embed.pos_embed.copy_(position_table(model, torch.device(device)))
    return model.eval().requires_grad_(False)


def empty_transformer(name: str) -> SD3Transformer2DModel:
    """Return the module on the meta device: names and shapes without memory."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        return SD3Transformer2DModel(**config(name))


def random_values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw one parameter: bfloat16 on the generator's device.

    Args:
        name: A vector called `...weight` is a norm's, near 1; any other vector a bias, near 0.
        shape: [out, in, ...] of a matrix or convolution, or [width] of a vector.
        generator: Advances.
    """
    values = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) > 1:
        values *= values[0].numel() ** -0.5
    else:
        values *= 0.02
        if name.endswith(".weight"):
            values += 1
    return values.to(torch.bfloat16)


def position_table(model: SD3Transformer2DModel, device: torch.device) -> Tensor:
    """Compute the buffer that a module built without memory lacks, rounded as in a checkpoint.

    Returns:
        bfloat16 [1, pos_embed_max_size ** 2, width].
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    embed = model.pos_embed
    table: Tensor = get_2d_sincos_pos_embed(
        model.inner_dim,
        embed.pos_embed_max_size,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        device=device,
        output_type="pt",
    )
    return table[None].to(torch.bfloat16)


def random_inputs(
    model_config: Mapping[str, Any],
    rows: int,
    height: int,
    width: int,
    device: torch.device | str,
    *,
    text_tokens: int = TEXT_TOKENS,
    sigma: float = 0.7,
    seed: int = 0,
) -> Inputs:
    """Draw what one forward takes, float32 of unit size.

    Args:
        model_config: As `config` returns it, or a module's own.
        rows: Of the batch.
        height: Of the latents, pixels / 8.
        width: Of the latents.
        device: Where they are made.
        text_tokens: Of each prompt.
        sigma: Noise level of every row.
        seed: Equal seeds give equal inputs on one kind of device.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return Inputs(
        latents=normal(rows, model_config["in_channels"], height, width),
        sigmas=torch.full((rows,), sigma, device=device),
        prompt_embeds=normal(rows, text_tokens, model_config["joint_attention_dim"]),
        pooled=normal(rows, model_config["pooled_projection_dim"]),
    )
