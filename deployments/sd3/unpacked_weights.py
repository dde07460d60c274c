"""A small model's FP8 weights on a CPU, dequantised once instead of for each product.

A CPU has no FP8 products: unless they are INT8's (`int8.py`), each weight is made anew for every
call, a fifth of a step of the built-in model. What FP8 saves there is memory, of which a small
model needs little.
"""

from __future__ import annotations

import torch
from torch import nn

from deployments.sd3.fp8 import Fp8Linear
from deployments.sd3.linear import plain

# Of a model's unpacked FP8 weights. The built-in model's are 60 MiB; those of SD3.5 Medium, 4 GiB,
# stay packed: there the products dwarf the unpacking, and hosts run out of memory.
_MOST_BYTES = 512 << 20


def unpack_weights_(model: nn.Module, dtype: torch.dtype, most_bytes: int = _MOST_BYTES) -> bool:
    """Replace, in place, FP8 layers that dequantise by ordinary ones with the same numbers.

    Args:
        model: On a CPU.
        dtype: Of its inputs, which the weights take.
        most_bytes: That unpacked weights may take; beyond it all stay packed.

    Returns:
        Whether they were unpacked.
    """
    packed = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Fp8Linear) and not layer.takes_quantized
    ]
    if sum(layer.weight_fp8.numel() for *_, layer in packed) * dtype.itemsize > most_bytes:
        return False
    for parent, name, layer in packed:
        setattr(parent, name, plain(layer, dtype))
    return True
