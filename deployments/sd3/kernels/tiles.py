"""Which elements of a matrix a program works on, where it takes a tile of whole columns' width."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return its rows, its columns, where they lie, and which of them exist."""
    blocks = tl.cdiv(columns, COLUMNS)
    tile = tl.program_id(0)
    row = (tile // blocks) * ROWS + tl.arange(0, ROWS)
    column = (tile % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    # All modulation weights in one matrix have more than 2**31 elements.
    place = row[:, None].to(tl.int64) * stride + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, place, inside
