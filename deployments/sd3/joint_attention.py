"""From modulated tokens to what attention adds to them: projections, norms, attention, output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from deployments.sd3.attention import Attention
from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.joint_layout import adds_branches, from_joint, to_joint
from deployments.sd3.linear import (
    Linear,
    Quantization,
    Streams,
    agree_on_scale_,
    each_stream,
    int8_dtypes,
    quantization,
    stacked,
)
from deployments.sd3.lora_layers import Pending, RowLoras
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.stream_layout import PerStream, StreamLayout


class JointAttention(nn.Module):
    """Attention over image and text tokens, or, built from a block's second one, the image's only.

    Args:
        attn: diffusers' `Attention` with loaded weights, which are taken over.
        attention: How attention itself is computed.
        optimizations: What is switched on.
        name: Of `attn` in its block.
    """

    def __init__(
        self, attn: Any, attention: Attention, optimizations: Optimizations, name: str
    ) -> None:
        super().__init__()
        self.attention = attention
        self.on = optimizations
        self.heads = int(attn.heads)
        streams: list[Sequence[Linear]] = [(attn.to_q, attn.to_k, attn.to_v)]
        names = [[f"{name}.to_{each}" for each in "qkv"]]
        out, out_names = [attn.to_out[0]], [[f"{name}.to_out.0"]]
        if attn.add_k_proj is not None:
            streams.append((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            names.append([f"{name}.add_{each}_proj" for each in "qkv"])
            if not attn.context_pre_only:
                out.append(attn.to_add_out)
                out_names.append([f"{name}.to_add_out"])
        self.out = Streams(out, out_names)
        # One layer for each stream, or three: [layer][stream].
        fused = optimizations.fused_qkv
        layers = [[stacked(stream)] if fused else agree_on_scale_(stream) for stream in streams]
        named = [[of] if fused else [[each] for each in of] for of in names]
        self.projections: Any = nn.ModuleList(
            Streams(*of_streams)
            for of_streams in zip(zip(*layers, strict=True), zip(*named, strict=True), strict=True)
        )
        self.query_norms = nn.ModuleList(_present(attn.norm_q, attn.norm_added_q))
        self.key_norms = nn.ModuleList(_present(attn.norm_k, attn.norm_added_k))

    @property
    def input_quantization(self) -> Quantization | Literal[False]:
        """How its input is quantised, if it is."""
        return quantization(self.projections[0])

    @property
    def products(self) -> list[Streams]:
        """What a LoRA may adapt."""
        return [*self.projections, self.out]

    def forward(
        self,
        x: Tensor | QuantizedRows,
        layout: StreamLayout,
        left: StreamLayout,
        loras: RowLoras | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: [rows, D], modulated.
            layout: Of its rows.
            left: What is wanted of the result: the same, or the image only.
            loras: What adapts the rows of the batch.

        Returns:
            [rows of `left`, D].
        """
        query_norms, key_norms = _weights(self.query_norms), _weights(self.key_norms)
        within, after = int8_dtypes(x, self.products)
        adapted: Pending | None = None
        if len(self.projections) == 1:
            # The pass after this product reads all of it: it adds what is beside it for nothing.
            side = self.projections[0].side
            whole = each_stream(self.projections[0], x, layout, dtype=within)
            query, key, value = whole.chunk(3, dim=1)
            if loras is not None and side is not None:
                fused = self.on.fused_qk_norm
                if adds_branches(query, self.heads, query_norms, key_norms, fused=fused):
                    adapted = side.pending(x, layout, loras)
                else:
                    side.add_(whole, x, layout, loras)
        else:
            query, key, value = (
                each_stream(streams, x, layout, loras, dtype=within) for streams in self.projections
            )
        query, key, value = to_joint(
            (query, key, value),
            layout,
            self.heads,
            query_norms,
            key_norms,
            fused=self.on.fused_qk_norm,
            adapted=adapted,
        )
        attended = self.attention(query[:, : left.tokens], key, value)
        rows = from_joint(
            attended, left, quantize=quantization(self.out), fused=self.on.fused_quantize
        )
        return each_stream(self.out, rows, left, loras, dtype=after)


def _present(*norms: nn.Module | None) -> list[nn.Module]:
    return [norm for norm in norms if norm is not None]


def _weights(norms: nn.ModuleList) -> PerStream | None:
    weights: list[Any] = [norm.weight for norm in norms]
    return PerStream(weights[0], weights[1] if len(weights) > 1 else None) if weights else None
