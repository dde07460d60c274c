"""Tensors as numpy arrays: what travels between stages needs no torch to carry.

numpy has no bfloat16, so a uint16 array means the raw bits of bfloat16.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deployments.payloads import Array


def to_wire(tensor: Tensor) -> Array:
    """Return a contiguous copy on the host: uint16 bits for bfloat16, float32 for all else."""
    tensor = tensor.detach().to("cpu").contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.uint16).numpy())
    return np.array(tensor.float().numpy())


def from_wire(array: Array, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Undo `to_wire`; the result shares no memory with the array.

    Raises:
        TypeError: The array is neither float32 nor uint16.
    """
    if array.dtype not in (np.float32, np.uint16):
        raise TypeError(f"expected float32 or uint16 (bfloat16 bits), got {array.dtype}")
    # Arrays that came through an object store are read-only, which torch warns about.
    tensor = torch.from_numpy(np.array(array))
    if array.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device=device, dtype=dtype)
