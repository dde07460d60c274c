"""How a kernel holds one row of any width: as two blocks of columns.

Triton holds powers of two. One block alone would waste up to half its lanes (4096 for Large's 2432
columns); a power of two and a masked rest (2048 and 512) waste little. Every width of SD3.5 (1536,
2432, 6144, 9728) fits within 5 % or exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl


def row_blocks(columns: int) -> dict[str, int]:
    """Return the constants that the kernels here take.

    Args:
        columns: Of a row, at least 2.

    Returns:
        WIDTH itself; FIRST, the largest power of two below it; SECOND, the least that covers the
        rest.
    """
    first = 1 << ((columns - 1).bit_length() - 1)
    return {"WIDTH": columns, "FIRST": first, "SECOND": 1 << (columns - first - 1).bit_length()}


@triton.jit
def row_sum(a, b):
    """Sum both blocks of a row."""
    return tl.sum(a, 0) + tl.sum(b, 0)


@triton.jit
def row_max(a, b):
    """Return the largest value of both blocks of a row."""
    return tl.maximum(tl.max(a, 0), tl.max(b, 0))


@triton.jit
def row_scale(a, b, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """Return what a row is divided by so that E4M3 holds it."""
    return tl.maximum(row_max(tl.abs(a), tl.abs(b)) / LARGEST, SMALLEST)


@triton.jit
def row_columns(WIDTH: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Return the columns of both blocks, and which of the second's exist."""
    second = FIRST + tl.arange(0, SECOND)
    return tl.arange(0, FIRST), second, second < WIDTH
