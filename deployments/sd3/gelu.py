"""The feed-forward's activation, GELU in its tanh form, and the quantisation after it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from deployments.sd3.fp8 import QuantizedRows, quantize_rows


def gelu(x: Tensor, *, quantize: bool, fused: bool) -> Tensor | QuantizedRows:
    """Activate; the function is approximated by tanh, as SD3 was trained with.

    Args:
        x: [rows, columns], contiguous.
        quantize: Return E4M3 rows with a scale each.
        fused: In one pass, on a CUDA device.
    """
    if fused and quantize and x.is_cuda:
        from deployments.sd3.kernels.gelu import quantized_gelu

        return quantized_gelu(x)
    activated = F.gelu(x, approximate="tanh")
    return quantize_rows(activated) if quantize else activated
