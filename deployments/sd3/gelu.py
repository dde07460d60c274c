"""The feed-forward's activation, GELU in its tanh form, and the quantisation after it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.linear import Quantization, quantized
from deployments.sd3.stream_layout import StreamLayout


def gelu(
    x: Tensor, layout: StreamLayout, *, quantize: Quantization | Literal[False], fused: bool
) -> Tensor | QuantizedRows:
    """Activate; the function is approximated by tanh, as SD3 was trained with.

    Args:
        x: [rows, columns], contiguous.
        layout: Whose the rows are.
        quantize: How to return E4M3 rows with a scale each, or False.
        fused: In one pass, on a CUDA device.
    """
    if fused and quantize and x.is_cuda:
        from deployments.sd3.kernels.gelu import quantized_gelu

        return quantized_gelu(x, layout, quantize)
    return quantized(F.gelu(x, approximate="tanh"), layout, quantize)
