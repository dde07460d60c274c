"""Weights in FP8 and their scales, in whatever form a file has them, as rows of E4M3.

The resident form is E4M3 with one float32 scale a row (`deployments.sd3.fp8`). A scale of the whole
tensor is repeated; a plain cast has scale 1; E5M2 is rewritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deployments.sd3.fp8 import dequantize
from deployments.sd3.stored_tensors import StoredTensors
from serve.checkpoints.part import INPUT_SCALE
from serve.errors import ConfigurationError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE = "_scale"  # `X.weight_scale` beside `X.weight`
# Of E4M3, as a power of two; what a row is scaled to, so that E5M2's two bits of mantissa survive.
_LARGEST_EXPONENT = 8


def rows_scale(stored: StoredTensors, name: str, value: Tensor) -> Tensor | None:
    """Return float32 scales, one a row, on the host, for an FP8 tensor; None for any other.

    Raises:
        ConfigurationError: A scale has another shape than one value or one a row, is not positive
            and finite, makes weights that are not, or belongs to a tensor that is not FP8.
    """
    stored_name = name + SCALE
    present = stored_name in stored.names()
    if value.dtype not in FP8:
        if present:
            raise _error(
                f"{stored.file_of(stored_name)} holds {stored_name!r}, but {name!r} is"
                f" {value.dtype}; expected float8_e4m3fn",
                stored_name,
            )
        return None
    rows = value.shape[0] if value.dim() else 1
    if not present:  # a plain cast
        return torch.ones(rows)
    scale = stored.read(stored_name)
    if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise _error(
            f"Tensor {stored_name!r} in {stored.file_of(stored_name)} is {scale.dtype};"
            f" expected float32",
            stored_name,
        )
    scale = scale.float()
    if scale.numel() not in (1, rows):
        raise _error(
            f"Tensor {stored_name!r} in {stored.file_of(stored_name)} has shape"
            f" {list(scale.shape)}; expected one value or [{rows}]",
            stored_name,
        )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise _error(
            f"Tensor {stored_name!r} in {stored.file_of(stored_name)} holds scales that"
            f" are not positive and finite",
            stored_name,
        )
    # A weight is the product, and is held or multiplied in bfloat16.
    largest = torch.finfo(torch.bfloat16).max / torch.finfo(value.dtype).max
    if bool((scale > largest).any()):
        raise _error(
            f"Tensor {stored_name!r} in {stored.file_of(stored_name)} holds a scale of"
            f" {scale.max().item():g}, which makes weights infinite; at most {largest:g} was"
            f" expected",
            stored_name,
        )
    return scale.reshape(-1).expand(rows).contiguous()


def input_scale(stored: StoredTensors, module: str, device: torch.device) -> Tensor | None:
    """Return the static scale of a Linear's input, a float32 scalar on the device, if any.

    Raises:
        ConfigurationError: It is not one positive finite float32.
    """
    name = module + INPUT_SCALE
    if name not in stored.names():
        return None
    scale = stored.read(name)
    if scale.dtype != torch.float32 or scale.shape not in ((), (1,)):
        raise _error(
            f"Tensor {name!r} in {stored.file_of(name)} is {scale.dtype}"
            f" {list(scale.shape)}; expected one float32 value, [] or [1]",
            name,
        )
    # A subnormal counts as zero: its inverse is infinite.
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= scale.item() <= limits.max:
        raise _error(
            f"Tensor {name!r} in {stored.file_of(name)} is {scale.item():g}; expected a"
            f" positive finite scale",
            name,
        )
    return scale.reshape(()).to(device, copy=True, non_blocking=True)


def finite(value: Tensor) -> Tensor:
    """Return one boolean on the tensor's device: no NaN, no infinity."""
    if value.dtype == torch.float8_e4m3fn:
        return ((value.view(torch.uint8) & 0x7F) != 0x7F).all()
    if value.dtype == torch.float8_e5m2:  # exponent all ones: infinities and NaN
        return ((value.view(torch.uint8) & 0x7C) != 0x7C).all()
    return torch.isfinite(value).all()


def as_e4m3(value: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite rows of E5M2 as E4M3.

    Each row is multiplied by the power of two that brings its largest value into E4M3's last
    binade, so that whatever lies within 15 binades of that stays exactly what it was.

    Args:
        value: float8_e5m2 [out, in], finite.
        scale: float32 [out].
    """
    rows = value.float()
    largest = rows.abs().amax(dim=1)
    exponent = torch.frexp(largest).exponent - 1
    factor = torch.exp2((exponent - _LARGEST_EXPONENT).float())
    factor = torch.where(largest > 0, factor, torch.ones_like(factor))
    codes = (rows / factor[:, None]).to(torch.float8_e4m3fn)
    return codes, scale * factor


def in_full(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an FP8 tensor of any shape times its scales, in an ordinary dtype."""
    rows = value.reshape(len(scale), -1)
    if value.dtype == torch.float8_e5m2:
        return rows.float().mul_(scale[:, None]).to(dtype).reshape(value.shape)
    return dequantize(rows, scale, dtype).reshape(value.shape)


def _error(message: str, name: str) -> ConfigurationError:
    return ConfigurationError(
        message + ".",
        field="model.path",
        value=name,
        allowed="weights that match their config.json",
    )
