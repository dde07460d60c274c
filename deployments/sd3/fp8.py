"""FP8 E4M3 weights that stay FP8 in memory; `unpacked_weights.py` and `int8.py` have exceptions.

Weights carry one float32 scale per output channel. Activations, where they are quantised at all,
carry one scale per row: a row belongs to one request, so no request's numbers touch another's. The
scale is the row's own, or a constant where the checkpoint brings one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

LARGEST_E4M3 = 448.0
SMALLEST_SCALE = 1e-12  # of a row of activations, so that a row of zeros stays one

Fp8Arithmetic = Literal["dequantize", "int8_mm", "scaled_mm", "unit_scaled_mm"]


@dataclass(frozen=True)
class QuantizedRows:
    """A matrix in E4M3, each row by its own scale: `values * scale`."""

    values: Tensor  # float8_e4m3fn [rows, in]
    scale: Tensor  # float32 [rows, 1]

    def __getitem__(self, rows: slice) -> QuantizedRows:
        """Return some of the rows, as views."""
        return QuantizedRows(self.values[rows], self.scale[rows])


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def quantize_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight matrix to E4M3 with one scale per output channel.

    Args:
        weight: [out, in], any float dtype, finite.

    Returns:
        float8_e4m3fn [out, in] and float32 scales [out] with `weight ~ quantised * scale`.
        A row of zeros gets scale 1, so that it comes back as zeros.
    """
    rows = weight.float()
    largest = rows.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / LARGEST_E4M3, torch.ones_like(largest))
    # A row of float32 subnormals would otherwise divide by a scale that rounded to zero.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    quantised = (rows / scale[:, None]).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return quantised.to(torch.float8_e4m3fn), scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight * scale`, computed in float32 and rounded once.

    Args:
        weight: float8_e4m3fn [out, in] without NaN codes.
        scale: float32 [out].
        dtype: Of the result.
    """
    if weight.device.type == "cpu":
        # torch's own cast from FP8 is scalar code on x86 (3.7 ns a weight); shifting the bits into
        # float16's fields is vectorised (0.3 ns, scaling included). The exponent biases differ by
        # 8, hence 2**8, and float16 also represents every E4M3 subnormal exactly.
        bits = weight.view(torch.int8).to(torch.int16)
        bits = bits.bitwise_left_shift_(7).bitwise_and_(-0x4080)
        values = bits.view(torch.float16).float()
        return values.mul_((scale * 256.0)[:, None]).to(dtype)
    if weight.is_cuda:
        from deployments.sd3.kernels.dequantize import dequantize_cuda

        return dequantize_cuda(weight, scale, dtype)
    return weight.float().mul_(scale[:, None]).to(dtype)


def quantize_rows(x: Tensor, static: Tensor | None = None) -> QuantizedRows:
    """Quantise activations to E4M3, each row by its own largest value or by a constant.

    Args:
        x: [rows, in], float.
        static: float32, a scalar or [rows, 1], positive: the scale, whatever x holds. Values beyond
            448 times it saturate. None: of each row's own largest value.
    """
    values = x.float()
    if static is None:
        scale = (values.abs().amax(dim=1, keepdim=True) / LARGEST_E4M3).clamp(min=SMALLEST_SCALE)
    else:
        # Not expanded: one row of an expanded scalar counts as contiguous and has strides of 0.
        scale = static * torch.ones((len(values), 1), device=values.device)
    quantised = (values / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return QuantizedRows(quantised.to(torch.float8_e4m3fn), scale)


class Fp8Linear(nn.Module):
    """A linear layer whose weight is resident in FP8.

    `arithmetic` is the one switch between the ways to multiply:
    `dequantize` makes the weight anew for each call, in the dtype of the input: bit for bit what
    `nn.Linear` gives on a dequantised copy. `int8_mm` does the same, and says that the layer may
    become an `Int8Linear`. The others multiply in FP8, on chips whose tensor cores can (slower than
    dequantising on a CPU), and differ in who applies the scales: `scaled_mm` the matrix product
    itself; `unit_scaled_mm` a pass over its output, for chips and torch releases whose product
    knows one scale for a whole matrix only.

    Args:
        weight: float8_e4m3fn [out, in].
        weight_scale: float32 [out].
        bias: [out] or None.
        arithmetic: See above.
        input_scale: float32 scalar, positive: what its input is divided by, known beforehand
            (static); None: each row's own. Read only where it multiplies in FP8.
    """

    weight_fp8: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    # transformers' T5 casts activations to the dtype of `wo.weight` if it is a tensor, which would
    # turn them into unscaled FP8. None is what it expects of quantised layers.
    weight: None = None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        arithmetic: Fp8Arithmetic = "dequantize",
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # FP8 tensor cores take sides that are multiples of 16.
        fits = self.in_features % 16 == 0 and self.out_features % 16 == 0
        self.arithmetic: Fp8Arithmetic = arithmetic if fits else "dequantize"
        self.register_buffer("weight_fp8", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_linear(cls, linear: nn.Linear, arithmetic: Fp8Arithmetic = "dequantize") -> Fp8Linear:
        """Quantise an ordinary layer; its bias is kept as it is."""
        weight, scale = quantize_per_channel(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(weight, scale, bias, arithmetic)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in an ordinary dtype."""
        return dequantize(self.weight_fp8, self.weight_scale, dtype)

    @property
    def takes_quantized(self) -> bool:
        """True if it multiplies in FP8, so that whoever makes its input may quantise it."""
        return self.arithmetic in ("scaled_mm", "unit_scaled_mm")

    def forward(self, x: Tensor | QuantizedRows, out: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in], or rows already quantised if `takes_quantized`.
            out: [rows, out], where the result goes; bfloat16 if it multiplies in FP8.

        Returns:
            [..., out] in x's dtype; bfloat16 for quantised rows.
        """
        if isinstance(x, QuantizedRows):
            return self._multiply(x, out)
        # As one matrix: given slices of a batch, torch would multiply row by row of the batch.
        rows = x.reshape(-1, self.in_features)
        if self.takes_quantized:
            result = self._multiply(quantize_rows(rows, self.input_scale), out).to(x.dtype)
        elif self.bias is None:
            result = torch.mm(rows, self.dequantized(x.dtype).t(), out=out)
        else:
            bias = self.bias.to(x.dtype)
            result = torch.addmm(bias, rows, self.dequantized(x.dtype).t(), out=out)
        return result.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, x: QuantizedRows, out: Tensor | None = None) -> Tensor:
        """Multiply in FP8: the kernels add a bias in bfloat16 only, and return bfloat16."""
        if out is None:
            out = x.values.new_empty((len(x.values), self.out_features), dtype=torch.bfloat16)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        if self.arithmetic == "scaled_mm":
            scales = x.scale, self.weight_scale[None, :]
            return _scaled_mm(x.values, self.weight_fp8, *scales, bias, out)
        from deployments.sd3.kernels.rescale import rescale_cuda_

        one = _one(out.device)
        _scaled_mm(x.values, self.weight_fp8, one, one, None, out)
        return rescale_cuda_(out, x.scale, self.weight_scale, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # `.to(dtype)` counts FP8 as floating point; the weight and the scales only ever move.
        weight, scale, input_scale = self.weight_fp8, self.weight_scale, self.input_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight_fp8 = weight.to(self.weight_fp8.device)
        self.weight_scale = scale.to(self.weight_scale.device)
        if input_scale is not None:
            self.input_scale = input_scale.to(self.weight_fp8.device)
        return self

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, fp8 per channel"


def _scaled_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write `x @ weight.T` to out, summed as the tensor cores do it fastest.

    Hopper's FP8 units add in less than float32 unless told otherwise; beside the error of E4M3
    itself that is nothing (`loadtest.fidelity` measures both).
    """
    torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        out=out,
    )
    return out


def quantize_linears(module: nn.Module, arithmetic: Fp8Arithmetic) -> None:
    """Replace every Linear inside a module by its FP8 form, one at a time, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            module.add_module(name, Fp8Linear.from_linear(child, arithmetic))
        else:
            quantize_linears(child, arithmetic)
