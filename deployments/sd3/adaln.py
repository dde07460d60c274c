"""Add a gated branch, normalise, modulate and, if wanted, quantise: what stands before each Linear.

Written plainly these are five passes over the tokens; the kernel in `kernels/adaln.py` is one, and
writes the FP8 values that the next product reads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.linear import Quantization, quantized
from deployments.sd3.stream_layout import PerStream, StreamLayout

EPSILON = 1e-6  # of every LayerNorm and RMSNorm in SD3


def modulate(
    hidden: Tensor,
    layout: StreamLayout,
    shift: PerStream,
    scale: PerStream,
    *,
    branch: Tensor | None = None,
    gate: PerStream | None = None,
    quantize: Quantization | Literal[False],
    fused: bool,
) -> Tensor | QuantizedRows:
    """Return `layer_norm(hidden + gate * branch) * (1 + scale) + shift`.

    Args:
        hidden: [rows, D]; with a branch, `gate * branch` is added to it in place.
        layout: Whose the rows are.
        shift: [B, D] for each stream.
        scale: [B, D] for each stream.
        branch: [rows, D] or None: what attention or the feed-forward returned.
        gate: [B, D] for each stream; with a branch only.
        quantize: How to return E4M3 rows with a scale each, or False.
        fused: In one pass, on a CUDA device.

    Returns:
        [rows, D].
    """
    if fused and hidden.is_cuda:
        from deployments.sd3.kernels.adaln import modulate_in_one_pass

        return modulate_in_one_pass(hidden, layout, shift, scale, branch, gate, quantize)
    modulated = torch.zeros_like(hidden)
    batch, width = layout.batch, hidden.shape[1]
    for (rows, stream_shift), (_, stream_scale) in zip(
        shift.over(layout), scale.over(layout), strict=True
    ):
        tokens = hidden[rows].view(batch, -1, width)
        normed = F.layer_norm(
            tokens if branch is None else _added(tokens, branch, rows, gate, layout),
            (width,),
            eps=EPSILON,
        )
        torch.addcmul(
            stream_shift[:, None],
            normed,
            1 + stream_scale[:, None],
            out=modulated[rows].view(batch, -1, width),
        )
    return quantized(modulated, layout, quantize)


def _added(
    tokens: Tensor, branch: Tensor, rows: slice, gate: PerStream | None, layout: StreamLayout
) -> Tensor:
    gates = {at.start: value for at, value in gate.over(layout)} if gate else {}
    return tokens.addcmul_(branch[rows].view_as(tokens), gates[rows.start][:, None])
