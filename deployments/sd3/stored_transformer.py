"""SD3.5's transformer under the names of its files: what weights are loaded into.

Names, shapes and arithmetic are those of diffusers' `SD3Transformer2DModel`. It is not used itself
because importing diffusers takes several times as long as reading Large's weights does. Only the
two embeddings compute; the rest holds weights until `transformer.py` takes them over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.sd3.positions import continued_positions

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

_TIME_CHANNELS = 256  # of the sinusoids that a timestep becomes
_LONGEST_PERIOD = 10_000.0


@dataclass(frozen=True)
class TransformerConfig:
    """What `transformer/config.json` says, with diffusers' names and defaults."""

    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Return what a configuration says; keys of no concern here are left out.

        Raises:
            ValueError: A number is none or not positive, or the norm of queries is unknown.
        """
        values = {each.name: config[each.name] for each in fields(cls) if each.name in config}
        values["dual_attention_layers"] = tuple(values.get("dual_attention_layers") or ())
        for name, value in values.items():
            if name in ("dual_attention_layers", "qk_norm"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, not a whole number above 0")
        if values.get("qk_norm") not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {values['qk_norm']!r}, not rms_norm")
        return cls(**values)

    @property
    def width(self) -> int:
        """Numbers in the state of one token."""
        return self.num_attention_heads * self.attention_head_dim


class StoredTransformer(nn.Module):
    """The transformer's weights by their names.

    Args:
        config: Of its folder.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.pos_embed = _PatchEmbed(config)
        self.time_text_embed = _TimeTextEmbed(width, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            _Block(config, index) for index in range(config.num_layers)
        )
        self.norm_out = _Modulated(width, 2)
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)

    @classmethod
    def taking_over(cls, model: SD3Transformer2DModel) -> StoredTransformer:
        """Return the same weights out of diffusers' own module, which is empty afterwards.

        Layers that were quantised in it stay so.

        Args:
            model: With its weights in memory.
        """
        with torch.device("meta"):
            stored = cls(TransformerConfig.of(model.config))
        leaves = [name for name, module in stored.named_modules() if module._parameters]
        for name in leaves:
            stored.set_submodule(name, model.get_submodule(name))
        stored.pos_embed.pos_embed = model.pos_embed.pos_embed
        model._modules.clear()
        return stored


class _PatchEmbed(nn.Module):
    """Latents to image tokens, with the middle of a square table of positions added."""

    pos_embed: Tensor  # [1, side * side, width]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.side = config.pos_embed_max_size
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.width, patch, stride=patch)
        self.register_buffer("pos_embed", torch.zeros(1, self.side**2, config.width))

    def widen(self, side: int, spacing: float) -> None:
        """Take pictures of so many patches a side, as `continued_positions` does."""
        self.pos_embed = continued_positions(self.pos_embed, side, spacing)
        self.side = side

    def forward(self, latents: Tensor) -> Tensor:
        """Return [B, h/p * w/p, width] of latents [B, C, h, w]."""
        patches = self.proj(latents)
        height, width = patches.shape[-2:]
        if max(height, width) > self.side:
            raise ValueError(f"{height} x {width} patches; the table of positions has {self.side}")
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = self.pos_embed.view(1, self.side, self.side, -1)
        positions = table[:, top : top + height, left : left + width].flatten(1, 2)
        tokens: Tensor = patches.flatten(2).transpose(1, 2)
        return (tokens + positions).to(tokens.dtype)


class _TimeTextEmbed(nn.Module):
    """A timestep and the pooled prompt to the vector that modulates every block."""

    def __init__(self, width: int, pooled_width: int) -> None:
        super().__init__()
        self.timestep_embedder = _TwoLinears(_TIME_CHANNELS, width)
        self.text_embedder = _TwoLinears(pooled_width, width)

    def forward(self, timesteps: Tensor, pooled: Tensor) -> Tensor:
        """Return [B, width].

        Args:
            timesteps: float32 [B], 0 to 1000.
            pooled: [B, pooled width].
        """
        # diffusers' `get_timestep_embedding` with flip_sin_to_cos and no shift of frequencies.
        half = _TIME_CHANNELS // 2
        exponent = -math.log(_LONGEST_PERIOD) * torch.arange(
            half, dtype=torch.float32, device=timesteps.device
        )
        angles = timesteps[:, None].float() * torch.exp(exponent / half)[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(pooled.dtype)
        embedded: Tensor = self.timestep_embedder(waves) + self.text_embedder(pooled)
        return embedded


class _TwoLinears(nn.Module):
    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inner, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return embedded


class _Block(nn.Module):
    """One joint block; the last one reads the text but does not write it."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        width = config.width
        self.context_pre_only = index == config.num_layers - 1
        self.use_dual_attention = index in config.dual_attention_layers
        self.norm1 = _Modulated(width, 9 if self.use_dual_attention else 6)
        self.norm1_context = _Modulated(width, 2 if self.context_pre_only else 6)
        self.attn = _Attention(config, reads_text=True, writes_text=not self.context_pre_only)
        self.attn2 = (
            _Attention(config, reads_text=False, writes_text=False)
            if self.use_dual_attention
            else None
        )
        self.ff = _FeedForward(width)
        self.ff_context = None if self.context_pre_only else _FeedForward(width)


class _Modulated(nn.Module):
    """The Linear that makes a norm's shifts, scales and gates."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)


class _Attention(nn.Module):
    def __init__(self, config: TransformerConfig, reads_text: bool, writes_text: bool) -> None:
        super().__init__()
        width = config.width

        def linear(wanted: bool = True) -> nn.Linear | None:
            return nn.Linear(width, width) if wanted else None

        def norm(wanted: bool = True) -> nn.RMSNorm | None:
            wanted = wanted and config.qk_norm is not None
            return nn.RMSNorm(config.attention_head_dim, eps=1e-6) if wanted else None

        self.heads = config.num_attention_heads
        self.context_pre_only = not writes_text
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.add_q_proj = linear(reads_text)
        self.add_k_proj = linear(reads_text)
        self.add_v_proj = linear(reads_text)
        self.to_add_out = linear(writes_text)
        self.norm_q, self.norm_k = norm(), norm()
        self.norm_added_q, self.norm_added_k = norm(reads_text), norm(reads_text)


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        up = nn.Module()
        up.proj = nn.Linear(width, 4 * width)
        # diffusers has a dropout between the two, and so the name `net.2`.
        self.net = nn.ModuleList([up, nn.Identity(), nn.Linear(4 * width, width)])
