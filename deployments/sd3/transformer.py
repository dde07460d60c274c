"""SD3's transformer from latents to velocity, flat: embed, blocks, project.

The same computation as diffusers' `SD3Transformer2DModel`, whose loaded weights it takes over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from deployments.sd3.adaln import modulate
from deployments.sd3.attention import Attention
from deployments.sd3.joint_block import JointBlock, Pending
from deployments.sd3.linear import Streams
from deployments.sd3.lora_layers import Adaptable, RowLoras, SideBranch
from deployments.sd3.modulation import Modulation
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.stored_transformer import StoredTransformer
from deployments.sd3.stream_layout import PerStream, StreamLayout


class Transformer(nn.Module):
    """The denoising transformer.

    Args:
        model: Loaded, in eval mode; its blocks are taken apart and their weights taken over. Only
            FP8 modulation weights are held twice, while they are stacked.
        attention: How attention is computed.
        optimizations: What is switched on.
    """

    def __init__(
        self, model: StoredTransformer, attention: Attention, optimizations: Optimizations
    ) -> None:
        super().__init__()
        self.patch = model.config.patch_size
        self.pos_embed = model.pos_embed
        self.time_text_embed = model.time_text_embed
        self.context_embedder = model.context_embedder
        self.norm_out = model.norm_out.linear
        self.proj_out = model.proj_out
        blocks: Any = model.transformer_blocks
        layers = [
            layer for block in blocks for layer in (block.norm1.linear, block.norm1_context.linear)
        ]
        names = [
            f"transformer_blocks.{index}.{norm}.linear"
            for index in range(len(blocks))
            for norm in ("norm1", "norm1_context")
        ]
        for block in blocks:
            block.norm1 = block.norm1_context = None
        as_dtype = None if optimizations.fp8_modulation else model.proj_out.weight.dtype
        self.modulation = Modulation(layers, names, as_dtype=as_dtype)
        del layers
        self.blocks = nn.ModuleList()
        for index, block in enumerate(blocks):
            self.blocks.append(JointBlock(block, attention, optimizations))
            blocks[index] = nn.Identity()
        self.attends_again = any(block.attend_again is not None for block in self.blocks)
        self.fused_adaln = optimizations.fused_adaln

    def adaptable(self) -> list[Adaptable]:
        """Return everything that a LoRA may adapt, in the order that `attach` takes."""
        named = [streams.adaptable(prefix) for prefix, streams in self._products()]
        return [*named, self.modulation.adaptable]

    def attach(self, branches: list[SideBranch]) -> None:
        """Put a side branch beside everything that can be adapted."""
        *of_blocks, self.modulation.side = branches
        for (_, streams), branch in zip(self._products(), of_blocks, strict=True):
            streams.side = branch

    def _products(self) -> Iterator[tuple[str, Streams]]:
        for index, block in enumerate(self.blocks):
            for streams in block.products:  # type: ignore[union-attr]
                yield f"transformer_blocks.{index}.", streams

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        loras: RowLoras | None = None,
    ) -> Tensor:
        """Predict velocities.

        Args:
            latents: [B, C, h, w].
            timesteps: float32 [B], 0 to 1000.
            prompt_embeds: [B, T, joint width].
            pooled: [B, pooled width].
            loras: What adapts each row; None where nothing adapts any.

        Returns:
            [B, C, h, w], in the dtype of the latents.
        """
        batch, _, height, width = latents.shape
        rows, columns = height // self.patch, width // self.patch
        layout = StreamLayout(batch, rows * columns, prompt_embeds.shape[1])
        condition = F.silu(self.time_text_embed(timesteps, pooled))
        hidden = latents.new_zeros(layout.rows, self.proj_out.in_features)
        hidden[layout.image_rows] = self.pos_embed(latents).flatten(0, 1)
        hidden[layout.text_rows] = self.context_embedder(prompt_embeds).flatten(0, 1)
        modulation = self.modulation(condition, loras)
        pending: Pending | None = None
        for block, image, text in zip(self.blocks, modulation[::2], modulation[1::2], strict=True):
            hidden, layout, pending = block(hidden, layout, pending, image, text, loras)
        hidden = self._projected(hidden, layout, pending, condition)
        # [B, rows, columns, patch, patch, C] -> [B, C, rows * patch, columns * patch]
        patches = hidden.view(batch, rows, columns, self.patch, self.patch, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)

    def _projected(
        self, hidden: Tensor, layout: StreamLayout, pending: Pending | None, condition: Tensor
    ) -> Tensor:
        scale, shift = self.norm_out(condition).chunk(2, dim=1)
        normed = modulate(
            hidden,
            layout,
            PerStream(shift, None),
            PerStream(scale, None),
            branch=pending.branch if pending else None,
            gate=pending.gate if pending else None,
            quantize=False,
            fused=self.fused_adaln,
        )
        projected: Tensor = self.proj_out(normed)
        return projected
