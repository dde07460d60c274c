"""Scales and bias applied to a product that was made without them, in one pass over memory.

`unit_scaled_mm` multiplies E4M3 matrices as if every scale were 1, for chips and torch releases
whose product knows one scale for a whole matrix only: one scale shared by requests would let one
change another. The scales of the rows and channels come afterwards, here: two bytes read and two
written per value, where torch's operations in a row move twenty-six.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.sd3.kernels.tiles import tile_of_program

_COLUMNS = 512
_ROWS = 4


# One compiled variant, whatever the number of rows and wherever a slice of them begins.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["row_scales"])
def rescale_kernel(
    product,
    row_scales,
    channel_scales,
    bias,
    rows,
    columns,
    stride,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scale one tile of the product [rows, columns] in place."""
    row, column, place, inside = tile_of_program(rows, columns, stride, ROWS, COLUMNS)
    row_scale = tl.load(row_scales + row, mask=row < rows, other=0.0)
    channel_scale = tl.load(channel_scales + column, mask=column < columns, other=0.0)
    value = tl.load(product + place, mask=inside, other=0.0).to(tl.float32)
    value = value * row_scale[:, None] * channel_scale[None, :]
    if HAS_BIAS:
        addend = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        value = value + addend[None, :]
    tl.store(product + place, value.to(product.dtype.element_ty), mask=inside)


def rescale_cuda_(
    product: Tensor, row_scale: Tensor, channel_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Return `product * row_scale * channel_scale + bias`, in place, rounded once from float32.

    Args:
        product: bfloat16 or float32 [rows, out], on a CUDA device; its rows contiguous.
        row_scale: float32 [rows, 1], contiguous.
        channel_scale: float32 [out], contiguous.
        bias: [out], contiguous, any float dtype, or None.

    Raises:
        ValueError: A tensor is not as said.
    """
    rows, columns = product.shape
    if columns > 1 and product.stride(1) != 1:
        raise ValueError("the rows of product must be contiguous")
    for name, scale, length in (
        ("row_scale", row_scale, rows),
        ("channel_scale", channel_scale, columns),
    ):
        if scale.dtype != torch.float32 or scale.numel() != length or not scale.is_contiguous():
            raise ValueError(f"{name} must be {length} contiguous float32 values")
    if bias is not None and (bias.numel() != columns or not bias.is_contiguous()):
        raise ValueError(f"bias must be {columns} contiguous values")
    if product.numel():
        tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _COLUMNS)
        rescale_kernel[(tiles,)](
            product,
            row_scale,
            channel_scale,
            channel_scale if bias is None else bias,
            rows,
            columns,
            product.stride(0),
            HAS_BIAS=bias is not None,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
        )
    return product
