"""Which number formats a stage runs in on this machine, and why, in words.

FP8 weights stay FP8 in memory wherever FP8 is chosen, but on a CPU for a small model's
(`unpacked_weights.py`) and where INT8 is fast (`int8.py`); only the arithmetic differs by chip.
NVIDIA cards are chosen for in `deployments.sd3.cuda_precision`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from deployments.sd3.fp8 import Fp8Arithmetic
from serve.errors import ConfigurationError

PrecisionName = Literal["fp8", "bf16", "fp32"]
REQUESTABLE = ("auto", "fp8", "bf16", "fp32")


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
        if self.weights == "fp8" and self.fp8_arithmetic == "unit_scaled_mm":
            return "fp8 weights, fp8 arithmetic scaled afterwards"
        if self.weights == "fp8" and self.fp8_arithmetic == "int8_mm":
            return "fp8 weights, int8 arithmetic"
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.compute_dtype]
        return f"{self.weights} weights, {short} arithmetic"

    def without_fp8(self, reason: str) -> PrecisionChoice:
        """Return what is fast for a part of the model that has no FP8 weights."""
        if self.weights != "fp8":
            return self
        # Where INT8 multiplies, float32 is faster than bfloat16.
        in_bf16 = self.compute_dtype == torch.bfloat16 and self.fp8_arithmetic != "int8_mm"
        name: PrecisionName = "bf16" if in_bf16 else "fp32"
        dtype = torch.bfloat16 if in_bf16 else torch.float32
        return PrecisionChoice(name, name, dtype, reason)

    def without_int8(self) -> PrecisionChoice:
        """Return the choice for a part of the model whose FP8 weights do not become INT8."""
        if self.fp8_arithmetic != "int8_mm":
            return self
        name = "bfloat16" if self.compute_dtype == torch.bfloat16 else "float32"
        reason = f"text takes little of a picture: FP8 weights in memory, made {name} per product"
        return replace(self, fp8_arithmetic="dequantize", reason=reason)


def choose_precision(
    requested: str,
    device: torch.device | str,
    *,
    pretend: str | None = None,
    fp8_arithmetic: Fp8Arithmetic | None = None,
    model_bytes_bf16: int | None = None,
) -> PrecisionChoice:
    """Choose number formats for a device.

    Args:
        requested: `auto`, `fp8`, `bf16` or `fp32`. `auto` is FP8 weights with the fastest
            arithmetic the device has for them; on an NVIDIA card without FP8 units it is bf16
            where that fits and is measured to be faster.
        device: Where the model will run.
        pretend: `sm_86`, `sm_89`: choose as if the card were of that capability.
        fp8_arithmetic: Of FP8 weights, instead of the fastest.
        model_bytes_bf16: Of the model's weights in bf16 (`weight_sizes.bf16_bytes`). Unknown, what
            does not fit is not refused and bf16 is not preferred to FP8.

    Raises:
        ConfigurationError: The value is unknown, the device is absent or cannot do it, or the
            weights do not fit its memory.
    """
    if requested not in REQUESTABLE:
        raise ConfigurationError(
            f"Unknown precision {requested!r}.",
            field="precision",
            value=requested,
            allowed="one of: " + ", ".join(REQUESTABLE),
        )
    if fp8_arithmetic is not None and requested not in ("auto", "fp8"):
        raise ConfigurationError(
            f"{fp8_arithmetic} multiplies by FP8 weights, but {requested} weights were asked for.",
            field="precision",
            value=requested,
            allowed="auto or fp8",
        )
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        from deployments.sd3.cuda_precision import choose_on_cuda

        return choose_on_cuda(
            requested,
            device,
            pretend=pretend,
            fp8_arithmetic=fp8_arithmetic,
            model_bytes_bf16=model_bytes_bf16,
        )
    if device.type != "cpu":
        raise ConfigurationError(
            f"This machine has no usable device {str(device)!r}.",
            field="device",
            value=str(device),
            allowed="cpu" + (", cuda" if torch.cuda.is_available() else ""),
        )
    if pretend is not None:
        raise ConfigurationError(
            f"A CPU cannot be taken for {pretend}.",
            field="pretend",
            value=pretend,
            allowed="an NVIDIA card of that capability or newer",
        )
    return _on_cpu(requested, fp8_arithmetic)


def as_choice(
    precision: PrecisionChoice | str, device: torch.device | str, folder: Path | None = None
) -> PrecisionChoice:
    """Return a choice as it is, and choose where only a name was given.

    Args:
        precision: A choice, or what `choose_precision` takes.
        device: Where the model will run.
        folder: Of the component, such as `MODEL/transformer`; tells how large it is.
    """
    if isinstance(precision, PrecisionChoice):
        return precision
    if folder is None or torch.device(device).type == "cpu":
        return choose_precision(precision, device)
    from deployments.sd3.weight_sizes import bf16_bytes

    return choose_precision(precision, device, model_bytes_bf16=bf16_bytes(folder))


def cpu_multiplies_bf16() -> bool:
    """True where the CPU has bfloat16 instructions; elsewhere float32 is far faster."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cpu_multiplies_int8() -> bool:
    """True where the CPU multiplies INT8 much faster than floats: Intel's, with VNNI and no AMX.

    With AMX bfloat16 is fast, too, and needs no quantising of what comes. AVX-512 alone, which is
    all that many virtual machines have, multiplies bfloat16 no faster than float32 on Intel's CPUs;
    others' are not measured.
    """
    has_vnni, has_amx = torch.cpu._is_vnni_supported(), torch.cpu._is_amx_tile_supported()
    return bool(has_vnni and not has_amx and _is_intels())


def _is_intels() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def asked_for(requested: str) -> str:
    """Begin a reason with what was asked for, if it was."""
    return "" if requested == "auto" else f"{requested} was asked for; "


def _on_cpu(requested: str, fp8_arithmetic: Fp8Arithmetic | None) -> PrecisionChoice:
    asked = asked_for(requested)
    if requested == "fp32":
        return PrecisionChoice("fp32", "fp32", torch.float32, asked + "runs anywhere")
    units = cpu_multiplies_bf16()
    if requested == "bf16":
        slow = "" if units else " (this CPU has no bfloat16 units: slow)"
        return PrecisionChoice("bf16", "bf16", torch.bfloat16, asked + "CPU" + slow)
    dtype, name = (torch.bfloat16, "bfloat16") if units else (torch.float32, "float32")
    kind = f"CPU with{'' if units else 'out'} bfloat16 units"
    if fp8_arithmetic is None and cpu_multiplies_int8():
        fp8_arithmetic = "int8_mm"
    if fp8_arithmetic == "int8_mm":
        if not torch.cpu._is_vnni_supported():
            raise ConfigurationError(
                "Sums of INT8 products may overflow on a CPU without VNNI.",
                field="fp8_arithmetic",
                value=fp8_arithmetic,
                allowed="dequantize or scaled_mm on this CPU",
            )
        fast = "with VNNI for INT8, for which alone, and float32, it is fast"
        reason = f"{asked}{kind} and {fast}; FP8 weights made INT8 once"
        return PrecisionChoice("fp8", "fp8", dtype, reason, fp8_arithmetic)
    if fp8_arithmetic is None or fp8_arithmetic == "dequantize":
        reason = f"{asked}{kind}: FP8 weights in memory, made {name} per product"
        return PrecisionChoice("fp8", "fp8", dtype, reason)
    if fp8_arithmetic == "unit_scaled_mm":
        raise ConfigurationError(
            "A CPU's product takes scales by row and channel; none are applied afterwards.",
            field="fp8_arithmetic",
            value=fp8_arithmetic,
            allowed="dequantize, int8_mm or scaled_mm on a CPU",
        )
    reason = f"{asked}{fp8_arithmetic} was asked for; {kind} and no FP8 units: slow"
    return PrecisionChoice("fp8", "fp8", dtype, reason, fp8_arithmetic)
