"""Load one component of a model into its real class, FP8 weights staying FP8.

The model is built without memory first and filled tensor by tensor, so neither a float32 copy nor
a second copy ever exists. What does not fit is refused by name, file, expected and found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from deployments.sd3.fp8 import Fp8Linear, quantize_per_channel
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.scaled_weights import (
    FP8,
    SCALE,
    as_e4m3,
    finite,
    in_full,
    input_scale,
    rows_scale,
)
from deployments.sd3.stored_tensors import StoredTensors
from deployments.sd3.upload import Upload
from serve.checkpoints.checks import listed
from serve.checkpoints.part import INPUT_SCALE
from serve.errors import ConfigurationError

_READABLE = (torch.float32, torch.float16, torch.bfloat16, *FP8)

Module = TypeVar("Module", bound=nn.Module)


def load_component(
    folder: Path,
    build: Callable[[], Module],
    device: torch.device,
    precision: PrecisionChoice,
    quantizable: str | None = None,
    together: Callable[[Module], Sequence[str]] | None = None,
) -> Module:
    """Build a model without memory and fill it from its folder.

    Args:
        folder: Such as `MODEL/transformer`.
        build: Makes the model with its parameters on the meta device.
        device: Where the tensors go.
        precision: FP8 weights stay FP8 if `weights` is fp8, else they are dequantised.
        quantizable: Name prefix of the Linear layers that become FP8 even where the files are
            bf16, or None to quantise nothing.
        together: Names the Linear layers whose FP8 weights lie one after the other in memory, so
            that stacking them later copies nothing.

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
    names = together(model) if together and precision.weights == "fp8" else ()
    with StoredTensors(folder) as stored:
        _Filler(model, stored, device, precision, quantizable, names).fill()
    return model.eval().requires_grad_(False)


class _Filler:
    def __init__(
        self,
        model: nn.Module,
        stored: StoredTensors,
        device: torch.device,
        precision: PrecisionChoice,
        quantizable: str | None,
        together: Sequence[str],
    ) -> None:
        self.model = model
        self.stored = stored
        self.device = device
        self.precision = precision
        self.quantizable = quantizable
        # transformers keeps {alias: source}; a file may hold either or both.
        self.aliases: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.rows_of = _rows_together(model, together, device)
        # On a card each answer is waited for only at the end.
        self.finite: dict[str, Tensor] = {}

    def fill(self) -> None:
        expected = dict(self.model.state_dict(keep_vars=True))
        for alias, source in self.aliases.items():
            expected.pop(alias, None)
            if source not in self.stored.names() and alias in self.stored.names():
                expected[alias] = expected.pop(source)
        self._check_names(set(expected))
        names = sorted(expected, key=self.stored.place)
        with Upload(self.device, (self.stored.read(name) for name in names)) as upload:
            for name in names:
                self._place(name, expected[name], upload)
        self._check_finite()
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
            files = ", ".join(str(path) for path in self.stored.part.files.paths[:3])
            raise self._error(f"{files} lacks {listed(missing)}", missing[0])
        scales = {name for name in found if name.endswith(SCALE)}
        strangers = found - expected - set(self.aliases)
        strangers -= {name for name in scales if name.removesuffix(SCALE) in expected}
        strangers -= {
            name + INPUT_SCALE
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        }
        # Older files hold buffers that newer classes make themselves.
        strangers -= {name for name, _ in self.model.named_buffers()}
        if strangers:
            names = sorted(strangers)
            raise self._error(
                f"{self.stored.file_of(names[0])} holds {listed(names)} that the model has no place"
                f" for",
                names[0],
            )

    def _place(self, name: str, empty: Tensor, upload: Upload) -> None:
        value = self.stored.read(name)
        self._check(name, value, empty)
        scale = rows_scale(self.stored, name, value)
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        linear = owner if isinstance(owner, nn.Linear) and leaf == "weight" else None
        # Read even where nothing is quantised, so that a wrong one is refused everywhere.
        static = input_scale(self.stored, owner_name, self.device) if linear else None
        if linear and self.precision.weights == "fp8":
            wanted = self.quantizable is not None and name.startswith(self.quantizable)
            if scale is not None or wanted:
                weight, scale = self._in_fp8(name, owner_name, value, scale, upload)
                arithmetic = self.precision.fp8_arithmetic
                if self.stored.in_full_precision(owner_name):
                    arithmetic = "dequantize"
                layer = Fp8Linear(weight, scale, linear.bias, arithmetic, static)
                self.model.set_submodule(owner_name, layer)
                return
        # Copied: what is read is a view of the whole mapped file.
        value = self._uploaded(name, value, upload)
        if scale is not None:
            value = in_full(value, scale.to(self.device, non_blocking=True), torch.float32)
        _assign(self.model, name, value.to(self.precision.compute_dtype))

    def _in_fp8(
        self, name: str, module: str, value: Tensor, scale: Tensor | None, upload: Upload
    ) -> tuple[Tensor, Tensor]:
        """Return a Linear's E4M3 weight and scales on the device, in their place if any."""
        rows = self.rows_of.get(module)
        if scale is not None:
            # What is small goes by itself; waiting for it would be waiting for all before it.
            scale = scale.to(self.device, non_blocking=True)
        if value.dtype == torch.float8_e4m3fn and scale is not None:
            weight = self._uploaded(name, value, upload, None if rows is None else rows[0])
        else:
            whole = self._uploaded(name, value, upload)
            if scale is None:
                weight, scale = quantize_per_channel(whole)
            else:
                weight, scale = as_e4m3(whole, scale)
        if rows is None:
            return weight, scale
        if weight is not rows[0]:
            rows[0].view(torch.uint8).copy_(weight.view(torch.uint8))
        rows[1].copy_(scale)
        return rows

    def _uploaded(
        self, name: str, value: Tensor, upload: Upload, out: Tensor | None = None
    ) -> Tensor:
        here = upload(value, out)
        self.finite[name] = finite(here)
        if self.device.type == "cpu":
            self._check_finite()
        return here

    def _check_finite(self) -> None:
        flags, self.finite = self.finite, {}
        if not flags:
            return
        for name, good in zip(flags, torch.stack(list(flags.values())).tolist(), strict=True):
            if not good:
                raise self._error(
                    f"Tensor {name!r} in {self.stored.file_of(name)} holds NaN or infinite values",
                    name,
                )

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
                f" expected one of float32, float16, bfloat16, float8_e4m3fn, float8_e5m2",
                name,
            )

    def _error(self, message: str, name: str) -> ConfigurationError:
        return ConfigurationError(
            message + ".",
            field="model.path",
            value=name,
            allowed="weights that match their config.json",
        )


def _rows_together(
    model: nn.Module, names: Sequence[str], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's place in one E4M3 matrix and one vector of scales for all of them."""
    layers = [model.get_submodule(name) for name in names]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linears or len(linears) < len(layers):
        return {}
    rows = sum(layer.out_features for layer in linears)
    width = linears[0].in_features
    weights = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(rows, device=device)
    places: dict[str, tuple[Tensor, Tensor]] = {}
    start = 0
    for name, layer in zip(names, linears, strict=True):
        own = slice(start, start + layer.out_features)
        places[name] = weights[own], scales[own]
        start = own.stop
    return places


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
