"""One row written as E4M3 with its scale: how every kernel here that quantises ends."""

from __future__ import annotations

import triton
import triton.language as tl

from deployments.sd3.kernels.row_blocks import row_columns, row_scale
from deployments.sd3.kernels.static_scales import saturated


@triton.jit
def store_quantized(
    x_a,
    x_b,
    values,
    scales,
    row,
    static,
    STATIC: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Write both blocks of a row, 0 beyond WIDTH, to `values` and its scale to `scales`.

    `static` points to the scale if that is known beforehand, else the row's own is taken.
    """
    a, b, inside = row_columns(WIDTH, FIRST, SECOND)
    at = row.to(tl.int64) * WIDTH
    of_row = tl.load(static) if STATIC else row_scale(x_a, x_b, LARGEST, SMALLEST)
    tl.store(scales + row, of_row)
    inverse = 1 / of_row
    x_a = saturated(x_a * inverse, STATIC, LARGEST)
    x_b = saturated(x_b * inverse, STATIC, LARGEST)
    tl.store(values + at + a, x_a.to(values.dtype.element_ty))
    tl.store(values + at + b, x_b.to(values.dtype.element_ty), mask=inside)
