"""FP8 weights made bfloat16 in one pass over memory, on NVIDIA cards without FP8 units (sm_80, 86).

Such cards hold FP8 weights to save memory and multiply in bfloat16. Triton refuses its own E4M3
type below sm_89, so the codes are read as bytes and their bits shifted into a float16, just as
`deployments.sd3.fp8.dequantize` does on a CPU: no FP8 instruction is used, on no card. A byte is
read and two are written per weight; torch's own operations in a row move fifteen.

Every variant compiles once, on its first call: at start-up, when the denoiser warms up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.sd3.kernels.tiles import tile_of_program

# A warp reads 512 codes of one row, 16 bytes a thread.
_COLUMNS = 512
_ROWS = 8


@triton.jit(do_not_specialize=["rows"])
def dequantize_kernel(
    codes,
    scales,
    out,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write `codes * scales` of one tile; codes are the bytes of E4M3, [rows, columns]."""
    row, _, place, inside = tile_of_program(rows, columns, columns, ROWS, COLUMNS)
    code = tl.load(codes + place, mask=inside, other=0)
    # The sign, extended to 16 bits, stays in the topmost; the bit beneath it is of the exponent.
    bits = (code.to(tl.int16) << 7) & -0x4080
    value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    # 2**8: what float16's exponent bias has more than E4M3's.
    scale = tl.load(scales + row, mask=row < rows, other=0.0) * 256.0
    tl.store(out + place, (value * scale[:, None]).to(out.dtype.element_ty), mask=inside)


def dequantize_cuda(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return `weight * scale`, computed in float32 and rounded once.

    Bit for bit what `deployments.sd3.fp8.dequantize` gives, for the 254 finite codes.

    Args:
        weight: float8_e4m3fn [out, in], contiguous, on a CUDA device, without NaN codes.
        scale: float32 [out], on the same device.
        dtype: Of the result: bfloat16, float16 or float32.
        out: [out, in] of that dtype, contiguous, to be overwritten; made anew if None.

    Raises:
        ValueError: A tensor is not as said.
    """
    rows, columns = weight.shape
    if weight.dtype != torch.float8_e4m3fn or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous float8_e4m3fn, is {weight.dtype}")
    if scale.dtype != torch.float32 or scale.shape != (rows,) or not scale.is_contiguous():
        raise ValueError(f"scale must be float32 [{rows}], is {scale.dtype} {list(scale.shape)}")
    if out is None:
        out = torch.empty((rows, columns), dtype=dtype, device=weight.device)
    elif out.dtype != dtype or out.shape != weight.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous {dtype} {[rows, columns]}")
    if not weight.device == scale.device == out.device:
        raise ValueError("weight, scale and out must be on one device")
    if weight.numel():
        tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _COLUMNS)
        dequantize_kernel[(tiles,)](
            weight.view(torch.int8), scale, out, rows, columns, ROWS=_ROWS, COLUMNS=_COLUMNS
        )
    return out
