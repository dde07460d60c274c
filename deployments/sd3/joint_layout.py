"""From two streams of tokens to the one sequence that attention sees, and back.

Queries and keys pass RMSNorm on the way in; what comes out is quantised for the next product if it
multiplies in FP8. `kernels/joint_layout.py` does each way in one pass, without concatenating.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deployments.sd3.adaln import EPSILON
from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.linear import Quantization, quantized
from deployments.sd3.lora_layers import Pending
from deployments.sd3.stream_layout import PerStream, StreamLayout


def to_joint(
    projected: tuple[Tensor, Tensor, Tensor],
    layout: StreamLayout,
    heads: int,
    query_norm: PerStream | None,
    key_norm: PerStream | None,
    *,
    fused: bool,
    adapted: Pending | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each [B, N + T, heads, width], image tokens first.

    Args:
        projected: Three of [rows, heads * width], perhaps views of one matrix.
        layout: Whose the rows are.
        heads: Number of heads.
        query_norm: RMSNorm weights [width] of each stream, or None in models without.
        key_norm: Likewise.
        fused: In one pass, on a CUDA device.
        adapted: A branch beside the three as one product, to be added first; only where
            `adds_branches` says so.
    """
    width = projected[0].shape[1] // heads
    if adds_branches(projected[0], heads, query_norm, key_norm, fused=fused):
        from deployments.sd3.kernels.joint_layout import to_joint_in_one_pass

        assert query_norm
        assert key_norm
        return to_joint_in_one_pass(projected, layout, heads, query_norm, key_norm, adapted)
    assert adapted is None
    norms = (query_norm, key_norm, None)
    query, key, value = (
        torch.cat(
            [
                _normed(each[rows].reshape(layout.batch, -1, heads, width), norm, stream)
                for stream, rows in _streams(layout)
            ],
            dim=1,
        )
        for each, norm in zip(projected, norms, strict=True)
    )
    return query, key, value


def adds_branches(
    projected: Tensor,
    heads: int,
    query_norm: PerStream | None,
    key_norm: PerStream | None,
    *,
    fused: bool,
) -> bool:
    """Return whether `to_joint` is one pass for such a projection, which takes a branch along."""
    width = projected.shape[1] // heads
    # Triton's blocks are powers of two.
    is_power = width & (width - 1) == 0
    return fused and projected.is_cuda and None not in (query_norm, key_norm) and is_power


def from_joint(
    attended: Tensor,
    layout: StreamLayout,
    *,
    quantize: Quantization | Literal[False],
    fused: bool,
) -> Tensor | QuantizedRows:
    """Return what attention gave as the token matrix again.

    Args:
        attended: [B, tokens, D]; tokens may be the image's only.
        layout: Of the result; with `text` 0, text tokens of `attended` are left out.
        quantize: How to return E4M3 rows with a scale each, or False.
        fused: In one pass, on a CUDA device.
    """
    if fused and quantize and attended.is_cuda:
        from deployments.sd3.kernels.joint_layout import from_joint_in_one_pass

        return from_joint_in_one_pass(attended, layout, quantize)
    width = attended.shape[2]
    tokens = attended.new_zeros(layout.rows, width)
    shape = (layout.batch, -1, width)
    tokens[layout.image_rows].view(shape).copy_(attended[:, : layout.image])
    if layout.text:
        tokens[layout.text_rows].view(shape).copy_(attended[:, layout.image :])
    return quantized(tokens, layout, quantize)


def _streams(layout: StreamLayout) -> list[tuple[int, slice]]:
    both = [(0, layout.image_rows), (1, layout.text_rows)]
    return both if layout.text else both[:1]


def _normed(x: Tensor, norm: PerStream | None, stream: int) -> Tensor:
    weight = None if norm is None else norm[stream]
    if weight is None:
        return x
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), EPSILON)
