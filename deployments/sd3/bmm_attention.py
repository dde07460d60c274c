"""Joint attention on a CPU in bfloat16 without AMX, as two matrix products.

torch's own CPU attention kernel does not use bfloat16 dot-product instructions; the matrix products
do: 2.2 times as fast at 336 tokens, 2.5 times at 1104 (one thread, avx512_bf16). It does use AMX,
and in float32 it is the faster one anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores of one product at most, so that long sequences take time and not memory.
_MOST_SCORES = 16 << 20


def bmm_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend without a mask.

    Args:
        query: [B, heads, query tokens, width].
        key: [B, heads, tokens, width].
        value: The same shape.

    Returns:
        [B, query tokens, heads * width].
    """
    batch, heads, tokens, width = query.shape
    query = (query * width**-0.5).reshape(batch * heads, tokens, width)
    keys = key.reshape(batch * heads, -1, width).transpose(1, 2)
    value = value.reshape(batch * heads, -1, width)
    rows = max(1, min(tokens, _MOST_SCORES // (batch * heads * keys.shape[2])))
    parts = [
        torch.bmm(torch.bmm(query[:, begin : begin + rows], keys).softmax(-1), value)
        for begin in range(0, tokens, rows)
    ]
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return attended.reshape(batch, heads, tokens, width).transpose(1, 2).flatten(2)
