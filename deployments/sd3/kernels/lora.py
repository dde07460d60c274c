"""Side branches of all rows of a batch in two kernels a layer: down to the ranks, and up again.

A program works on tokens of one row, whichever stream they are of, and loops over that row's pages;
so rows with other LoRAs, other ranks or none share a launch, and nothing of one row meets another.
Both are bound by memory: the first reads the product's input once, quantised as it lies there, the
second reads and writes its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.stream_layout import StreamLayout

if TYPE_CHECKING:
    from deployments.sd3.lora_layers import RowLoras, SideBranch

_RANKS = 16
# The quickest of 24 and of 18 on an H100, at all widths of Large at 1024x1024 with 2 rows.
_DOWN_TOKENS, _DOWN_COLUMNS, _DOWN_WARPS, _DOWN_STAGES = 64, 128, 4, 3
_UP_TOKENS, _UP_COLUMNS, _UP_WARPS = 64, 128, 4


def add_low_rank_cuda_(
    branch: SideBranch,
    out: Tensor,
    x: Tensor | QuantizedRows,
    layout: StreamLayout,
    loras: RowLoras,
) -> None:
    """See `SideBranch.add_`."""
    up_(branch, out, down(branch, x, layout, loras), layout, loras)


def down(
    branch: SideBranch, x: Tensor | QuantizedRows, layout: StreamLayout, loras: RowLoras
) -> Tensor:
    """Bring the input down to the ranks of each row's pages, times their weights.

    Returns:
        [rows, most pages a row, parts * 16] in the branch's dtype; what no page gives is not set.
    """
    values = x.values if isinstance(x, QuantizedRows) else x
    parts = len(branch.of.columns)
    most, down_image = loras.pages.shape[1], branch.down[0]
    ranks = torch.empty(
        (layout.rows, most, parts * _RANKS), dtype=down_image.dtype, device=values.device
    )
    columns = min(64, triton.next_power_of_2(parts * _RANKS))
    programs, blocks = _programs(layout, _DOWN_TOKENS)
    _down[(programs, triton.cdiv(parts * _RANKS, columns))](
        values,
        x.scale if isinstance(x, QuantizedRows) else values,
        ranks,
        down_image,
        branch.down[-1],
        branch.touched,
        *loras.tensors,
        most,
        branch.touched.stride(0),
        down_image.stride(0),
        layout.batch,
        layout.text_start,
        layout.image,
        layout.text,
        *blocks,
        INPUTS=branch.of.inputs,
        RANKS=parts * _RANKS,
        QUANTIZED=isinstance(x, QuantizedRows),
        PRECISION=_precision(down_image),
        TOKENS=_DOWN_TOKENS,
        BLOCK_RANKS=columns,
        BLOCK_INPUTS=_DOWN_COLUMNS,
        num_warps=_DOWN_WARPS,
        num_stages=_DOWN_STAGES,
    )
    return ranks


def up_(
    branch: SideBranch, out: Tensor, ranks: Tensor, layout: StreamLayout, loras: RowLoras
) -> None:
    """Add up(ranks) of each row's pages to `out`.

    Args:
        branch: Of the layer.
        out: [rows, columns], contiguous.
        ranks: As `down` returns them.
        layout: Whose the rows are.
        loras: Of the batch's rows.
    """
    programs, blocks = _programs(layout, _UP_TOKENS)
    blocks_a_unit = triton.cdiv(branch.unit, _UP_COLUMNS)
    up_image = branch.up[0]
    _up[(programs, blocks_a_unit * len(branch.part_of_unit))](
        out,
        ranks,
        up_image,
        branch.up[-1],
        branch.touched,
        branch.part_of_unit,
        *loras.tensors,
        loras.pages.shape[1],
        branch.touched.stride(0),
        up_image.stride(0),
        out.stride(0),
        layout.batch,
        layout.text_start,
        layout.image,
        layout.text,
        *blocks,
        blocks_a_unit,
        branch.unit,
        RANKS=ranks.shape[2],
        PAGE=_RANKS,
        PRECISION=_precision(up_image),
        TOKENS=_UP_TOKENS,
        COLUMNS=_UP_COLUMNS,
        num_warps=_UP_WARPS,
    )


def _programs(layout: StreamLayout, tokens: int) -> tuple[int, tuple[int, int]]:
    """Return the programs of all rows, and those of one row's image and text, at least 1."""
    image, text = triton.cdiv(layout.image, tokens), triton.cdiv(layout.text, tokens)
    return layout.batch * (image + text), (image, max(text, 1))


def _precision(weights: Tensor) -> str:
    return "ieee" if weights.dtype == torch.float32 else "tf32"


@triton.jit
def _tokens_of_program(
    batch, text_start, image_tokens, text_tokens, image_blocks, text_blocks, TOKENS: tl.constexpr
):
    """Return a program's stream, batch row, rows of the token matrix and which of them exist."""
    block = tl.program_id(0)
    stream = (block >= batch * image_blocks).to(tl.int32)
    if stream == 0:
        of = block // image_blocks
        token = (block % image_blocks) * TOKENS + tl.arange(0, TOKENS)
        row = of * image_tokens + token
        inside = token < image_tokens
    else:
        block -= batch * image_blocks
        of = block // text_blocks
        token = (block % text_blocks) * TOKENS + tl.arange(0, TOKENS)
        row = text_start + of * text_tokens + token
        inside = token < text_tokens
    return stream, of, row, inside


@triton.jit(
    do_not_specialize=[
        "batch", "text_start", "image_tokens", "text_tokens", "image_blocks", "text_blocks", "most"
    ]
)  # fmt: skip
def _down(
    x,
    scale,
    ranks,
    down_image,
    down_text,
    touched,
    pages,
    weights,
    counts,
    most,
    touched_stride,
    page_stride,
    batch,
    text_start,
    image_tokens,
    text_tokens,
    image_blocks,
    text_blocks,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    stream, of, row, inside = _tokens_of_program(
        batch, text_start, image_tokens, text_tokens, image_blocks, text_blocks, TOKENS
    )
    rank = tl.program_id(1) * BLOCK_RANKS + tl.arange(0, BLOCK_RANKS)
    column = tl.arange(0, BLOCK_INPUTS)
    for at in range(tl.load(counts + of)):
        page = tl.load(pages + of * most + at)
        if tl.load(touched + stream * touched_stride + page) != 0:
            down = down_image
            if stream == 1:
                down = down_text
            down += page.to(tl.int64) * page_stride
            sums = tl.zeros((TOKENS, BLOCK_RANKS), dtype=tl.float32)
            for begin in range(0, INPUTS, BLOCK_INPUTS):
                given = inside[:, None]
                held = (rank < RANKS)[None, :]
                if INPUTS % BLOCK_INPUTS != 0:
                    given &= (begin + column < INPUTS)[None, :]
                    held &= (begin + column < INPUTS)[:, None]
                values = tl.load(
                    x + row.to(tl.int64)[:, None] * INPUTS + begin + column[None, :],
                    mask=given,
                    other=0.0,
                ).to(down_image.dtype.element_ty)
                matrix = tl.load(
                    down + rank[None, :] * INPUTS + begin + column[:, None], mask=held, other=0.0
                )
                sums = tl.dot(values, matrix, sums, input_precision=PRECISION)
            sums *= tl.load(weights + of * most + at)
            if QUANTIZED:
                sums *= tl.load(scale + row, mask=inside, other=0.0)[:, None]
            tl.store(
                ranks + (row.to(tl.int64)[:, None] * most + at) * RANKS + rank[None, :],
                sums.to(ranks.dtype.element_ty),
                mask=inside[:, None] & (rank < RANKS)[None, :],
            )


@triton.jit(
    do_not_specialize=[
        "batch", "text_start", "image_tokens", "text_tokens", "image_blocks", "text_blocks", "most"
    ]
)  # fmt: skip
def _up(
    out,
    ranks,
    up_image,
    up_text,
    touched,
    part_of_unit,
    pages,
    weights,
    counts,
    most,
    touched_stride,
    page_stride,
    out_stride,
    batch,
    text_start,
    image_tokens,
    text_tokens,
    image_blocks,
    text_blocks,
    blocks_a_unit,
    unit_columns,
    RANKS: tl.constexpr,
    PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    stream, of, row, inside = _tokens_of_program(
        batch, text_start, image_tokens, text_tokens, image_blocks, text_blocks, TOKENS
    )
    unit = tl.program_id(1) // blocks_a_unit
    within = (tl.program_id(1) % blocks_a_unit) * COLUMNS + tl.arange(0, COLUMNS)
    exists = within < unit_columns
    column = unit * unit_columns + within
    rank = tl.arange(0, PAGE)
    of_part = tl.load(part_of_unit + unit) * PAGE + rank
    count = tl.load(counts + of)
    adapted = 0
    for at in range(count):
        page = tl.load(pages + of * most + at)
        adapted += tl.load(touched + stream * touched_stride + page)
    if adapted != 0:
        place = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
        mask = inside[:, None] & exists[None, :]
        # Under way while the ranks are waited for.
        before = tl.load(place, mask=mask, other=0.0)
        sums = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        for at in range(count):
            page = tl.load(pages + of * most + at)
            if tl.load(touched + stream * touched_stride + page) != 0:
                up = up_image
                if stream == 1:
                    up = up_text
                hidden = tl.load(
                    ranks + (row.to(tl.int64)[:, None] * most + at) * RANKS + of_part[None, :],
                    mask=inside[:, None],
                    other=0.0,
                )
                matrix = tl.load(
                    up + page.to(tl.int64) * page_stride + column[None, :] * PAGE + rank[:, None],
                    mask=exists[None, :],
                    other=0.0,
                )
                sums = tl.dot(hidden, matrix, sums, input_precision=PRECISION)
        sums += before.to(tl.float32)
        tl.store(place, sums.to(out.dtype.element_ty), mask=mask)
