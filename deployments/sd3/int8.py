"""INT8 products: what an FP8 model multiplies in on a CPU that has VNNI and no AMX.

Such a CPU has fast units for INT8 and slow ones for bfloat16: 666 x 256 by 256 x 1024 takes 0.49 ms
in INT8, 2.2 in float32 and 4.2 in bfloat16 (one thread of a Xeon with AVX-512). So E4M3 weights are
made INT8 once, with a scale for each output channel, and the rows that meet them as they come, each
with a scale of its own: vector-wise quantisation, Dettmers et al., arXiv:2208.07339, section 2.1.
Sums of integers are exact, so a row's numbers do not depend on what shares its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deployments.sd3.fp8 import SMALLEST_SCALE, Fp8Linear, dequantize

LARGEST_INT8 = 127.0
# Of a weight while it is made INT8, float32 meanwhile: all of a model's modulation is one weight.
_ROWS_AT_ONCE = 2048


def quantize_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row by its own largest value; a row with a NaN gets a scale of NaN.

    Args:
        rows: float32 [rows, columns], overwritten.

    Returns:
        int8 [rows, columns] and float32 scales [rows, 1] with `rows ~ quantised * scale`.
    """
    largest = torch.maximum(rows.amax(dim=1, keepdim=True), rows.amin(dim=1, keepdim=True).neg_())
    scale = largest.div_(LARGEST_INT8).clamp_(min=SMALLEST_SCALE)
    return rows.mul_(scale.reciprocal()).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer whose weight is resident in INT8; for inference on a CPU.

    Args:
        layer: Whose weight is taken over, quantised anew; of more than one column, which torch
            would take for a row. What a weight errs by is half of `largest of its channel / 127`
            at most, beside E4M3's own sixteenth of itself.
    """

    weight_int8: Tensor  # [out, in]
    weight_scale: Tensor  # float32 [out]
    bias: Tensor | None  # float32 [out]

    def __init__(self, layer: Fp8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = torch.empty_like(layer.weight_fp8, dtype=torch.int8)
        scale = torch.empty_like(layer.weight_scale)
        for begin in range(0, self.out_features, _ROWS_AT_ONCE):
            rows = slice(begin, begin + _ROWS_AT_ONCE)
            values = dequantize(layer.weight_fp8[rows], layer.weight_scale[rows], torch.float32)
            weight[rows], scale[rows, None] = quantize_to_int8(values)
        self.register_buffer("weight_int8", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in], float.
            out: [rows, out], where the result goes.

        Returns:
            [..., out] in x's dtype.
        """
        rows = x.reshape(-1, self.in_features)
        if out is None:
            out = x.new_empty((len(rows), self.out_features))
        multiply_in_int8([(slice(None), self)], rows, out)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8 per channel"


def multiply_in_int8(parts: Sequence[tuple[slice, Int8Linear]], x: Tensor, out: Tensor) -> None:
    """Apply layers of one shape, each to rows of its own; what they share is one pass over all.

    Args:
        parts: Rows, and the layer for them.
        x: [rows, in], float.
        out: [rows, out], where the result goes; rows of no layer are left as they are.
    """
    rows, scale = quantize_to_int8(x.to(torch.float32, copy=True))
    sums = torch.empty((len(rows), out.shape[1]), dtype=torch.int32)
    for at, layer in parts:
        torch._int_mm(rows[at], layer.weight_int8.t(), out=sums[at])
    products = sums.float().mul_(scale)
    for at, layer in parts:
        if layer.bias is None:
            torch.mul(products[at], layer.weight_scale, out=out[at])
        else:
            torch.addcmul(layer.bias, products[at], layer.weight_scale, out=out[at])


def become_int8_(model: nn.Module) -> None:
    """Replace the FP8 layers that are to multiply in INT8, one by one: no two are held twice."""
    for parent in [each for each in model.modules() if not isinstance(each, Fp8Linear)]:
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Fp8Linear) and layer.arithmetic == "int8_mm":
                setattr(parent, name, Int8Linear(layer))
