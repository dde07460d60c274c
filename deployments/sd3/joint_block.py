"""One block of SD3's transformer: two streams of tokens, one attention over both.

The same computation as diffusers' `JointTransformerBlock`, on the token matrix of
`stream_layout.py`. Its weights are taken over from a block of that class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from deployments.sd3.adaln import modulate
from deployments.sd3.attention import Attention
from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.gelu import gelu
from deployments.sd3.joint_attention import JointAttention
from deployments.sd3.linear import (
    Quantization,
    Streams,
    each_stream,
    int8_dtypes,
    quantization,
)
from deployments.sd3.lora_layers import RowLoras
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.stream_layout import PerStream, StreamLayout


@dataclass(frozen=True)
class Pending:
    """What a sub-layer returned; the next one adds it, since it reads the hidden state anyway."""

    branch: Tensor  # [rows, D]
    gate: PerStream  # [B, D] each


class JointBlock(nn.Module):
    """One block.

    Args:
        block: diffusers' block with loaded weights, which are taken over.
        attention: Of the whole model.
        optimizations: What is switched on.
    """

    def __init__(self, block: Any, attention: Attention, optimizations: Optimizations) -> None:
        super().__init__()
        self.on = optimizations
        # The last block reads the text but does not write it.
        self.writes_text = not block.context_pre_only
        self.attend = JointAttention(block.attn, attention, optimizations, "attn")
        # Medium's first blocks attend a second time, among image tokens only.
        self.attend_again = (
            JointAttention(block.attn2, attention, optimizations, "attn2")
            if block.use_dual_attention
            else None
        )
        feed_forwards = [block.ff, block.ff_context] if self.writes_text else [block.ff]
        names = ["ff", "ff_context"][: len(feed_forwards)]
        self.up = Streams(
            [each.net[0].proj for each in feed_forwards], [[f"{each}.net.0.proj"] for each in names]
        )
        self.down = Streams(
            [each.net[2] for each in feed_forwards], [[f"{each}.net.2"] for each in names]
        )

    @property
    def products(self) -> list[Streams]:
        """What a LoRA may adapt."""
        again = self.attend_again.products if self.attend_again else []
        return [*self.attend.products, *again, self.up, self.down]

    def forward(
        self,
        hidden: Tensor,
        layout: StreamLayout,
        pending: Pending | None,
        image: Tensor,
        text: Tensor,
        loras: RowLoras | None = None,
    ) -> tuple[Tensor, StreamLayout, Pending]:
        """Run the block.

        Args:
            hidden: [rows, D], changed in place.
            layout: Of its rows.
            pending: From the block before.
            image: [B, 6 D], or [B, 9 D] with a second attention: the image's modulation.
            text: [B, 6 D], or [B, 2 D] in the last block.
            loras: What adapts the rows of the batch.

        Returns:
            hidden, its layout (the last block leaves the image only), and what is to be added.
        """
        of_image = image.chunk(9 if self.attend_again else 6, dim=1)
        left = layout if self.writes_text else layout.image_only
        if self.writes_text:
            of_text: tuple[Tensor | None, ...] = text.chunk(6, dim=1)
        else:
            scale, shift = text.chunk(2, dim=1)  # diffusers' AdaLayerNormContinuous: scale first
            of_text = (shift, scale, None, None, None, None)
        shifts, scales, gates, mlp_shifts, mlp_scales, mlp_gates = (
            PerStream(*pair) for pair in zip(of_image[:6], of_text, strict=True)
        )

        quantize = self.attend.input_quantization
        normed = self._modulated(hidden, layout, shifts, scales, pending, quantize)
        attended = self.attend(normed, layout, left, loras)
        if self.attend_again:
            self._add_second(hidden, layout.image_only, loras, *of_image[6:])
        hidden, layout = hidden[: left.rows], left

        pending = Pending(attended, gates)
        quantize = quantization(self.up)
        normed = self._modulated(hidden, layout, mlp_shifts, mlp_scales, pending, quantize)
        within, after = int8_dtypes(normed, (self.up, self.down))
        up = each_stream(self.up, normed, layout, loras, dtype=within)
        active = gelu(
            up,
            layout,
            quantize=quantization(self.down),
            fused=self.on.fused_gelu,
            for_int8=within is not None,
        )
        down = each_stream(self.down, active, layout, loras, dtype=after)
        return hidden, layout, Pending(down, mlp_gates)

    def _add_second(
        self,
        hidden: Tensor,
        layout: StreamLayout,
        loras: RowLoras | None,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
    ) -> None:
        """Add the second attention to the image rows, in place; it reads what the first read."""
        assert self.attend_again
        hidden = hidden[: layout.rows]
        normed = self._modulated(
            hidden,
            layout,
            PerStream(shift, None),
            PerStream(scale, None),
            None,
            self.attend_again.input_quantization,
        )
        attended = self.attend_again(normed, layout, layout, loras)
        shape = (layout.batch, layout.image, -1)
        hidden[layout.image_rows].view(shape).addcmul_(gate[:, None], attended.view(shape))

    def _modulated(
        self,
        hidden: Tensor,
        layout: StreamLayout,
        shift: PerStream,
        scale: PerStream,
        pending: Pending | None,
        quantize: Quantization | Literal[False],
    ) -> Tensor | QuantizedRows:
        return modulate(
            hidden,
            layout,
            shift,
            scale,
            branch=pending.branch if pending else None,
            gate=pending.gate if pending else None,
            quantize=quantize,
            fused=self.on.fused_adaln,
        )
