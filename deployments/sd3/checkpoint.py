"""Load one component of a Diffusers directory into its real class, FP8 weights staying FP8.

The model is built without memory first and filled tensor by tensor, so neither a float32 copy nor
a second copy ever exists. What does not fit is refused by name, file, expected and found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from deployments.sd3.fp8 import Fp8Linear, dequantize, quantize_per_channel
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.stored_tensors import StoredTensors
from serve.errors import ConfigurationError

_FP8 = torch.float8_e4m3fn
_READABLE = (torch.float32, torch.float16, torch.bfloat16, _FP8)
_SCALE = "_scale"  # `X.weight_scale` beside `X.weight`
_INPUT_SCALE = ".input_scale"  # `X.input_scale`, of what a Linear X reads; newer scaled-FP8 files

Module = TypeVar("Module", bound=nn.Module)


def load_component(
    folder: Path,
    build: Callable[[], Module],
    device: torch.device,
    precision: PrecisionChoice,
    quantizable: str | None = None,
) -> Module:
    """Build a model without memory and fill it from its folder.

    Args:
        folder: Such as `MODEL/transformer`.
        build: Makes the model with its parameters on the meta device.
        device: Where the tensors go.
        precision: FP8 weights stay FP8 if `weights` is fp8, else they are dequantised.
        quantizable: Name prefix of the Linear layers that become FP8 even where the files are
            bf16, or None to quantise nothing.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        ConfigurationError: The configuration is no model's; or a tensor is missing, unexpected,
            of a wrong shape or dtype, or not finite, with file, tensor, expected and found.
    """
    try:
        model = build()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"{folder / 'config.json'} describes no model that can be built: {error}",
            field="model.path",
            value=str(folder / "config.json"),
        ) from error
    with StoredTensors(folder) as stored:
        _Filler(model, stored, device, precision, quantizable).fill()
    return model.eval().requires_grad_(False)


class _Filler:
    def __init__(
        self,
        model: nn.Module,
        stored: StoredTensors,
        device: torch.device,
        precision: PrecisionChoice,
        quantizable: str | None,
    ) -> None:
        self.model = model
        self.stored = stored
        self.device = device
        self.precision = precision
        self.quantizable = quantizable
        # transformers keeps {alias: source}; a file may hold either or both.
        self.aliases: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})

    def fill(self) -> None:
        expected = dict(self.model.state_dict(keep_vars=True))
        for alias, source in self.aliases.items():
            expected.pop(alias, None)
            if source not in self.stored.names() and alias in self.stored.names():
                expected[alias] = expected.pop(source)
        self._check_names(set(expected))
        for name, empty in expected.items():
            self._place(name, empty)
        for alias, source in self.aliases.items():
            filled = source if source in expected else alias
            weight = self.model.get_parameter(filled)
            for other in (alias, source):
                _assign(self.model, other, weight)
        for name, buffer in self.model.named_buffers():
            if buffer.device != self.device:
                _assign(self.model, name, buffer.to(self.device))

    def _check_names(self, expected: set[str]) -> None:
        found = self.stored.names()
        if missing := sorted(expected - found):
            raise self._error(
                f"{self.stored.folder} lacks tensor {missing[0]!r}" + _and_more(missing),
                missing[0],
            )
        scales = {name for name in found if name.endswith(_SCALE)}
        strangers = found - expected - set(self.aliases)
        strangers -= {name for name in scales if name.removesuffix(_SCALE) in expected}
        strangers -= {
            name + _INPUT_SCALE
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }
        # Older files hold buffers that newer classes make themselves.
        strangers -= {name for name, _ in self.model.named_buffers()}
        if strangers:
            first = min(strangers)
            raise self._error(
                f"{self.stored.file_of(first)} holds tensor {first!r} that the model has no place"
                f" for" + _and_more(sorted(strangers)),
                first,
            )

    def _place(self, name: str, empty: Tensor) -> None:
        value = self.stored.read(name)
        self._check(name, value, empty)
        scale = self._scale(name, value)
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        linear = owner if isinstance(owner, nn.Linear) and leaf == "weight" else None
        # Read even where nothing is quantised, so that a wrong one is refused everywhere.
        input_scale = self._input_scale(owner_name + _INPUT_SCALE) if linear else None
        if linear and self.precision.weights == "fp8":
            wanted = self.quantizable is not None and name.startswith(self.quantizable)
            if value.dtype == _FP8 or wanted:
                # Copied: what safetensors returns is a view of the whole mapped file.
                weight = value.to(self.device, copy=True)
                if scale is None:
                    weight, scale = quantize_per_channel(weight)
                layer = Fp8Linear(
                    weight,
                    scale.to(self.device),
                    linear.bias,
                    self.precision.fp8_arithmetic,
                    input_scale,
                )
                self.model.set_submodule(owner_name, layer)
                return
        if scale is not None:
            flat = dequantize(value.reshape(len(scale), -1), scale, torch.float32)
            value = flat.reshape(value.shape)
        value = value.to(device=self.device, dtype=self.precision.compute_dtype, copy=True)
        _assign(self.model, name, value)

    def _check(self, name: str, value: Tensor, empty: Tensor) -> None:
        if value.shape != empty.shape:
            raise self._error(
                f"Tensor {name!r} in {self.stored.file_of(name)} has shape {list(value.shape)};"
                f" the configuration expects {list(empty.shape)}",
                name,
            )
        if value.dtype not in _READABLE:
            raise self._error(
                f"Tensor {name!r} in {self.stored.file_of(name)} has dtype {value.dtype};"
                f" expected one of float32, float16, bfloat16, float8_e4m3fn",
                name,
            )
        if value.dtype == _FP8:
            finite = not bool(((value.view(torch.uint8) & 0x7F) == 0x7F).any())
        else:
            finite = bool(torch.isfinite(value).all())
        if not finite:
            raise self._error(
                f"Tensor {name!r} in {self.stored.file_of(name)} holds NaN or infinite values", name
            )

    def _scale(self, name: str, value: Tensor) -> Tensor | None:
        """Return float32 scales, one a row, for an FP8 tensor; None for any other."""
        stored_name = name + _SCALE
        present = stored_name in self.stored.names()
        if value.dtype != _FP8:
            if present:
                raise self._error(
                    f"{self.stored.file_of(stored_name)} holds {stored_name!r}, but {name!r} is"
                    f" {value.dtype}; expected float8_e4m3fn",
                    stored_name,
                )
            return None
        rows = value.shape[0] if value.dim() else 1
        if not present:  # a plain cast
            return torch.ones(rows)
        scale = self.stored.read(stored_name).float()
        if scale.numel() not in (1, rows):
            raise self._error(
                f"Tensor {stored_name!r} in {self.stored.file_of(stored_name)} has shape"
                f" {list(scale.shape)}; expected one value or [{rows}]",
                stored_name,
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise self._error(
                f"Tensor {stored_name!r} in {self.stored.file_of(stored_name)} holds scales that"
                f" are not positive and finite",
                stored_name,
            )
        return scale.reshape(-1).expand(rows).contiguous()

    def _input_scale(self, name: str) -> Tensor | None:
        """Return the static scale of a Linear's input, a float32 scalar on the device, if any."""
        if name not in self.stored.names():
            return None
        scale = self.stored.read(name)
        if scale.dtype != torch.float32 or scale.shape not in ((), (1,)):
            raise self._error(
                f"Tensor {name!r} in {self.stored.file_of(name)} is {scale.dtype}"
                f" {list(scale.shape)}; expected one float32 value, [] or [1]",
                name,
            )
        # A subnormal counts as zero: its inverse is infinite.
        limits = torch.finfo(torch.float32)
        if not limits.tiny <= scale.item() <= limits.max:
            raise self._error(
                f"Tensor {name!r} in {self.stored.file_of(name)} is {scale.item():g}; expected a"
                f" positive finite scale",
                name,
            )
        return scale.reshape(()).to(self.device, copy=True)

    def _error(self, message: str, name: str) -> ConfigurationError:
        return ConfigurationError(
            message + ".",
            field="model.path",
            value=name,
            allowed="weights that match their config.json",
        )


def resident_bytes(module: nn.Module) -> int:
    """Return the memory that a model's tensors take, each storage counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
        )
    else:
        owner._buffers[leaf] = value


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
