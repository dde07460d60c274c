"""Both ways between the token matrix and attention's sequence, a kernel each.

Buys 21 ms a step of Large at 1024x1024 on an H100 on the way in (norm, concatenation and
transposition are one read and one write) and 14 on the way back, which writes the FP8 rows that the
output projection reads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.sd3.adaln import EPSILON
from deployments.sd3.fp8 import LARGEST_E4M3, SMALLEST_SCALE, QuantizedRows
from deployments.sd3.kernels.quantized_row import store_quantized
from deployments.sd3.kernels.row_blocks import row_blocks, row_columns
from deployments.sd3.kernels.static_scales import static_scales
from deployments.sd3.linear import Quantization
from deployments.sd3.lora_layers import Pending
from deployments.sd3.stream_layout import PerStream, StreamLayout

_TOKENS_A_PROGRAM = 16
# A branch's matrices are read once a program: 136 us for Large at 1024x1024 instead of 152, and 99
# without a branch, whatever the number.
_TOKENS_WITH_A_BRANCH = 64


def to_joint_in_one_pass(
    projected: tuple[Tensor, Tensor, Tensor],
    layout: StreamLayout,
    heads: int,
    query_norm: PerStream,
    key_norm: PerStream,
    adapted: Pending | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `joint_layout.to_joint`; the three may have rows of any stride, the same for all."""
    query = projected[0]
    width = query.shape[1] // heads
    shape = (3, layout.batch, layout.tokens, heads, width)
    joint = torch.empty(shape, dtype=query.dtype, device=query.device)
    tokens = _TOKENS_A_PROGRAM if adapted is None else _TOKENS_WITH_A_BRANCH
    parts = triton.cdiv(layout.tokens, tokens)
    _to_joint[(layout.batch * parts, heads)](
        *projected,
        joint,
        query_norm.image,
        query_norm.image if query_norm.text is None else query_norm.text,
        key_norm.image,
        key_norm.image if key_norm.text is None else key_norm.text,
        query.stride(0),
        layout.batch,
        layout.text_start,
        layout.image,
        layout.text,
        parts,
        **_branch(adapted, query),
        HEADS=heads,
        HEAD_WIDTH=width,
        TOKENS=tokens,
        EPSILON_=EPSILON,
        num_warps=4,
    )
    return joint[0], joint[1], joint[2]


def _branch(adapted: Pending | None, unread: Tensor) -> dict[str, Any]:
    """Return the kernel's arguments for a branch; without one they are not read."""
    if adapted is None:
        named = ("ranks", "up_image", "up_text", "touched", "pages", "counts")
        numbers = ("most", "touched_stride", "page_stride")
        return dict.fromkeys(named, unread) | dict.fromkeys(numbers, 0) | {"ADAPTED": False}
    branch, loras = adapted.branch, adapted.loras
    return {
        "ranks": adapted.ranks,
        "up_image": branch.up[0],
        "up_text": branch.up[-1],
        "touched": branch.touched,
        "pages": loras.pages,
        "counts": loras.counts,
        "most": loras.pages.shape[1],
        "touched_stride": branch.touched.stride(0),
        "page_stride": branch.up[0].stride(0),
        "ADAPTED": True,
    }


def from_joint_in_one_pass(
    attended: Tensor, layout: StreamLayout, quantize: Quantization
) -> QuantizedRows:
    """See `joint_layout.from_joint`; columns of `attended` are contiguous."""
    columns = attended.shape[2]
    values = torch.empty((layout.rows, columns), dtype=torch.float8_e4m3fn, device=attended.device)
    scale = torch.empty((layout.rows, 1), dtype=torch.float32, device=attended.device)
    _from_joint[(layout.rows,)](
        attended,
        values,
        scale,
        attended.stride(0),
        attended.stride(1),
        layout.batch * layout.image,
        layout.text_start,
        layout.image,
        max(layout.text, 1),
        **static_scales(quantize, scale),
        **row_blocks(columns),
        LARGEST=LARGEST_E4M3,
        SMALLEST=SMALLEST_SCALE,
        num_warps=2,
    )
    return QuantizedRows(values, scale)


# Strides are multiples of 16, and only what is specialised for that is read 16 bytes at a time.
@triton.jit(
    do_not_specialize=["batch", "text_start", "image_tokens", "text_tokens", "parts", "most"]
)
def _to_joint(
    query,
    key,
    value,
    joint,
    query_norm_image,
    query_norm_text,
    key_norm_image,
    key_norm_text,
    row_stride,
    batch,
    text_start,
    image_tokens,
    text_tokens,
    parts,
    ranks,
    up_image,
    up_text,
    touched,
    pages,
    counts,
    most,
    touched_stride,
    page_stride,
    ADAPTED: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    EPSILON_: tl.constexpr,
):
    of = tl.program_id(0) // parts
    head = tl.program_id(1)
    tokens = image_tokens + text_tokens
    token = (tl.program_id(0) % parts) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, HEAD_WIDTH)
    inside = (token < tokens)[:, None]
    is_image = token < image_tokens
    row = tl.where(
        is_image,
        of * image_tokens + token,
        text_start + of * text_tokens + token - image_tokens,
    )
    source = row.to(tl.int64)[:, None] * row_stride + head * HEAD_WIDTH + column[None, :]
    to = ((of * tokens + token).to(tl.int64)[:, None] * HEADS + head) * HEAD_WIDTH + column[None, :]
    # Elements of each of the three results.
    whole = batch.to(tl.int64) * tokens * HEADS * HEAD_WIDTH

    weight = tl.where(
        is_image[:, None],
        tl.load(query_norm_image + column)[None, :],
        tl.load(query_norm_text + column)[None, :],
    )
    x = tl.load(query + source, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        x += _low_rank(
            0, of, head, row, token, image_tokens, tokens, ranks, up_image, up_text, touched,
            pages, counts, most, touched_stride, page_stride, HEADS, HEAD_WIDTH, TOKENS
        )  # fmt: skip
    x = _rms_normed(x, weight, HEAD_WIDTH, EPSILON_)
    tl.store(joint + to, x.to(joint.dtype.element_ty), mask=inside)

    weight = tl.where(
        is_image[:, None],
        tl.load(key_norm_image + column)[None, :],
        tl.load(key_norm_text + column)[None, :],
    )
    x = tl.load(key + source, mask=inside, other=0.0).to(tl.float32)
    if ADAPTED:
        x += _low_rank(
            1, of, head, row, token, image_tokens, tokens, ranks, up_image, up_text, touched,
            pages, counts, most, touched_stride, page_stride, HEADS, HEAD_WIDTH, TOKENS
        )  # fmt: skip
    x = _rms_normed(x, weight, HEAD_WIDTH, EPSILON_)
    tl.store(joint + whole + to, x.to(joint.dtype.element_ty), mask=inside)

    x = tl.load(value + source, mask=inside, other=0.0)
    if ADAPTED:
        x = x.to(tl.float32) + _low_rank(
            2, of, head, row, token, image_tokens, tokens, ranks, up_image, up_text, touched,
            pages, counts, most, touched_stride, page_stride, HEADS, HEAD_WIDTH, TOKENS
        )  # fmt: skip
    tl.store(joint + 2 * whole + to, x.to(joint.dtype.element_ty), mask=inside)


@triton.jit
def _low_rank(
    part: tl.constexpr,
    of,
    head,
    row,
    token,
    image_tokens,
    tokens,
    ranks,
    up_image,
    up_text,
    touched,
    pages,
    counts,
    most,
    touched_stride,
    page_stride,
    HEADS: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Return what LoRAs add to one head of query, key or value: float32 [TOKENS, HEAD_WIDTH]."""
    rank = tl.arange(0, 16)
    column = (part * HEADS + head) * HEAD_WIDTH + tl.arange(0, HEAD_WIDTH)
    first = tl.min(token, 0)
    sums = tl.zeros((TOKENS, HEAD_WIDTH), dtype=tl.float32)
    for at in range(tl.load(counts + of)):
        page = tl.load(pages + of * most + at)
        hidden = ranks + (row.to(tl.int64)[:, None] * most + at) * 48 + part * 16 + rank[None, :]
        matrix = page.to(tl.int64) * page_stride + column[None, :] * 16 + rank[:, None]
        # A program may have tokens of both streams, and each stream has its own matrices.
        if (first < image_tokens) & (tl.load(touched + page) != 0):
            own = (token < image_tokens)[:, None]
            sums = tl.dot(
                tl.load(hidden, mask=own, other=0.0), tl.load(up_image + matrix), sums,
                input_precision="ieee" if ranks.dtype.element_ty == tl.float32 else "tf32",
            )  # fmt: skip
        if (first + TOKENS > image_tokens) & (tl.load(touched + touched_stride + page) != 0):
            own = ((token >= image_tokens) & (token < tokens))[:, None]
            sums = tl.dot(
                tl.load(hidden, mask=own, other=0.0), tl.load(up_text + matrix), sums,
                input_precision="ieee" if ranks.dtype.element_ty == tl.float32 else "tf32",
            )  # fmt: skip
    return sums


@triton.jit
def _rms_normed(x, weight, WIDTH: tl.constexpr, EPSILON_: tl.constexpr):
    inverse = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPSILON_)
    return x * inverse[:, None] * weight.to(tl.float32)


@triton.jit(do_not_specialize=["image_rows", "text_start", "image_tokens", "text_tokens"])
def _from_joint(
    attended,
    values,
    scale,
    batch_stride,
    token_stride,
    image_rows,
    text_start,
    image_tokens,
    text_tokens,
    static_image,
    static_text,
    STATIC: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    row = tl.program_id(0)
    if (row >= image_rows) & (row < text_start):
        return  # between the streams
    if row < image_rows:
        of = row // image_tokens
        token = row % image_tokens
        static = static_image
    else:
        of = (row - text_start) // text_tokens
        token = image_tokens + (row - text_start) % text_tokens
        static = static_text
    source = of.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    a, b, inside = row_columns(WIDTH, FIRST, SECOND)
    x_a = tl.load(attended + source + a).to(tl.float32)
    x_b = tl.load(attended + source + b, mask=inside, other=0.0).to(tl.float32)
    store_quantized(
        x_a, x_b, values, scale, row, static, STATIC, WIDTH, FIRST, SECOND, LARGEST, SMALLEST
    )
