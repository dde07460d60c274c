"""Which number formats a stage runs in on this machine, and why, in words.

FP8 weights stay FP8 in memory wherever FP8 is chosen; only the arithmetic differs by chip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from deployments.sd3.fp8 import Fp8Arithmetic
from serve.errors import ConfigurationError

PrecisionName = Literal["fp8", "bf16", "fp32"]
REQUESTABLE = ("auto", "fp8", "bf16", "fp32")

_SMALLEST_FP8_CAPABILITY = (8, 9)
_SMALLEST_BF16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class PrecisionChoice:
    """What was chosen; `label` is what results report."""

    name: PrecisionName
    weights: PrecisionName  # how block weights are held in memory
    compute_dtype: torch.dtype
    reason: str
    fp8_arithmetic: Fp8Arithmetic = "dequantize"

    @property
    def label(self) -> str:
        """Weights and arithmetic in a few words, e.g. `fp8 weights, bf16 arithmetic`."""
        if self.weights == "fp8" and self.fp8_arithmetic == "scaled_mm":
            return "fp8 weights, fp8 arithmetic"
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.compute_dtype]
        return f"{self.weights} weights, {short} arithmetic"

    def without_fp8(self, reason: str) -> PrecisionChoice:
        """Return the same arithmetic for a part of the model that has no FP8 weights."""
        if self.weights != "fp8":
            return self
        name: PrecisionName = "bf16" if self.compute_dtype == torch.bfloat16 else "fp32"
        return replace(self, name=name, weights=name, reason=reason, fp8_arithmetic="dequantize")


def choose_precision(requested: str, device: torch.device | str) -> PrecisionChoice:
    """Choose number formats for a device.

    Args:
        requested: `auto`, `fp8`, `bf16` or `fp32`. `auto` is FP8 weights everywhere, with the
            fastest arithmetic the device has for them.
        device: Where the model will run.

    Raises:
        ConfigurationError: The value is unknown, the device is absent or cannot do it.
    """
    if requested not in REQUESTABLE:
        raise ConfigurationError(
            f"Unknown precision {requested!r}.",
            field="precision",
            value=requested,
            allowed="one of: " + ", ".join(REQUESTABLE),
        )
    device = torch.device(device)
    asked = "" if requested == "auto" else f"{requested} was asked for; "
    if requested == "fp32":
        return PrecisionChoice("fp32", "fp32", torch.float32, asked + "runs anywhere")
    if device.type == "cpu":
        return _on_cpu(requested, asked)
    if device.type == "cuda" and torch.cuda.is_available():
        return _on_cuda(requested, asked, device)
    raise ConfigurationError(
        f"This machine has no usable device {str(device)!r}.",
        field="device",
        value=str(device),
        allowed="cpu" + (", cuda" if torch.cuda.is_available() else ""),
    )


def as_choice(precision: PrecisionChoice | str, device: torch.device) -> PrecisionChoice:
    """Return a choice as it is, and choose where only a name was given."""
    if isinstance(precision, PrecisionChoice):
        return precision
    return choose_precision(precision, device)


def cpu_multiplies_bf16() -> bool:
    """True where the CPU has bfloat16 instructions; elsewhere bfloat16 is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _on_cpu(requested: str, asked: str) -> PrecisionChoice:
    if requested == "bf16":
        slow = "" if cpu_multiplies_bf16() else " (this CPU has no bfloat16 units: slow)"
        return PrecisionChoice("bf16", "bf16", torch.bfloat16, asked + "CPU" + slow)
    if cpu_multiplies_bf16():
        return PrecisionChoice(
            "fp8",
            "fp8",
            torch.bfloat16,
            asked + "CPU with bfloat16 units: FP8 weights in memory, made bfloat16 per product",
        )
    return PrecisionChoice(
        "fp8",
        "fp8",
        torch.float32,
        asked + "CPU without bfloat16 units: FP8 weights in memory, made float32 per product",
    )


def _on_cuda(requested: str, asked: str, device: torch.device) -> PrecisionChoice:
    capability = torch.cuda.get_device_capability(device)
    card = f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]})"
    if capability < _SMALLEST_BF16_CAPABILITY:
        raise ConfigurationError(
            f"{card} has no bfloat16 units.",
            field="precision",
            value=requested,
            allowed="fp32 on this card, or a card of sm_80 or newer",
        )
    if requested == "bf16":
        return PrecisionChoice("bf16", "bf16", torch.bfloat16, asked + card)
    if capability >= _SMALLEST_FP8_CAPABILITY:
        problem = _row_wise_fp8_problem(device)
        if problem is None:
            return PrecisionChoice(
                "fp8", "fp8", torch.bfloat16, f"{asked}{card} has FP8 tensor cores", "scaled_mm"
            )
        why = f"{card} has FP8 tensor cores, but this torch cannot use them row-wise ({problem})"
    else:
        why = f"{card} has no FP8 tensor cores"
    return PrecisionChoice(
        "fp8",
        "fp8",
        torch.bfloat16,
        f"{asked}{why}: FP8 weights in memory, made bfloat16 per product",
    )


def _row_wise_fp8_problem(device: torch.device) -> str | None:
    """Try one small product: row-wise scaling failed on sm_89 in some torch releases."""
    ones = torch.ones(16, 16, device=device, dtype=torch.float8_e4m3fn)
    scale = torch.ones(16, 1, device=device)
    try:
        product = torch._scaled_mm(
            ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16
        )
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None if bool((product == 16).all()) else "a wrong product"
