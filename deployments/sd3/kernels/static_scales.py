"""Scales of rows that are known beforehand: one a stream, from the checkpoint, in device memory.

They are read by the kernels, not passed as numbers: that would wait for the device at each call.
"""

from __future__ import annotations

from typing import Any, Literal

import triton
import triton.language as tl
from torch import Tensor

from deployments.sd3.linear import Quantization


def static_scales(quantize: Quantization | Literal[False], unread: Tensor) -> dict[str, Any]:
    """Return the arguments that the quantising kernels take.

    Args:
        quantize: How.
        unread: Float32, for the places of scales that there are none of.

    Returns:
        STATIC, whether scales are known; static_image and static_text, pointers to them.
    """
    static = quantize.static if quantize else None
    if static is None:
        return {"static_image": unread, "static_text": unread, "STATIC": False}
    text = static.image if static.text is None else static.text
    return {"static_image": static.image, "static_text": text, "STATIC": True}


@triton.jit
def saturated(x, STATIC: tl.constexpr, LARGEST: tl.constexpr):
    """Clamp what a static scale may leave too large; a row's own scale leaves nothing so."""
    if STATIC:
        # NaN must come out as NaN: a request with one fails, and must not look as if it had none.
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x
