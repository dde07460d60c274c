"""Linear layers of any kind, FP8, INT8 or plain, alone, stacked, or one for each stream.

And how what they read is quantised before they read it, which is for the layers to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deployments.sd3.fp8 import Fp8Linear, QuantizedRows, quantize_rows
from deployments.sd3.int8 import Int8Linear, multiply_in_int8
from deployments.sd3.lora_layers import Adaptable, RowLoras, SideBranch
from deployments.sd3.stream_layout import PerStream, StreamLayout

Linear = nn.Linear | Fp8Linear


class Streams(nn.ModuleList):
    """One layer for each stream, of the same shape, and the side branch beside them if any.

    Args:
        layers: The image's, then the text's if it has a part.
        names: diffusers' names of what each layer is made of, within the block: [stream][part].
    """

    def __init__(self, layers: Iterable[nn.Module], names: Sequence[Sequence[str]]) -> None:
        super().__init__(layers)
        self.names = tuple(tuple(stream) for stream in names)
        self.side: SideBranch | None = None

    def adaptable(self, prefix: str) -> Adaptable:
        """Return what a side branch would stand beside.

        Args:
            prefix: Of the names.
        """
        inputs, outputs = int(self[0].in_features), int(self[0].out_features)  # type: ignore[arg-type]
        parts = len(self.names[0])
        names = tuple(tuple(prefix + name for name in stream) for stream in self.names)
        return Adaptable(names, inputs, (outputs // parts,) * parts)


@dataclass(frozen=True)
class Quantization:
    """How rows become E4M3; functions that may quantise take one, or False.

    Attributes:
        static: float32 scalar of each stream, from the checkpoint; None is dynamic: each row is
            scaled by its own largest value.
    """

    static: PerStream | None = None


def quantization(readers: Iterable[nn.Module]) -> Quantization | Literal[False]:
    """Say how the input of layers is quantised, or that they do not all multiply in FP8.

    Args:
        readers: The image's layer, then the text's if it has a part. Unless all of them bring a
            static scale, both streams are dynamic: a producer knows one way at a time.
    """
    layers = list(readers)
    fp8 = [layer for layer in layers if isinstance(layer, Fp8Linear) and layer.takes_quantized]
    if len(fp8) < len(layers):
        return False
    scales = [layer.input_scale for layer in fp8 if layer.input_scale is not None]
    if len(scales) < len(layers):
        return Quantization()
    return Quantization(PerStream(scales[0], scales[1] if len(scales) > 1 else None))


def quantized(
    x: Tensor, layout: StreamLayout, how: Quantization | Literal[False]
) -> Tensor | QuantizedRows:
    """Quantise a token matrix as the layers that read it want it; the kernels' plain form.

    Args:
        x: [rows, D], float.
        layout: Whose the rows are.
        how: False returns x.
    """
    if not how:
        return x
    if how.static is None:
        return quantize_rows(x)
    scales = torch.ones(layout.rows, 1, device=x.device)
    for rows, scale in how.static.over(layout):
        scales[rows] = scale
    return quantize_rows(x, scales)


def each_stream(
    layers: Streams,
    x: Tensor | QuantizedRows,
    layout: StreamLayout,
    loras: RowLoras | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Apply the image's layer to the image rows and the text's to the text rows.

    Args:
        layers: One Linear, or two where the layout has text.
        x: [rows, in].
        layout: Of the rows.
        loras: What adapts the rows of the batch, if anything does.
        dtype: Of the result, where the layers are INT8; None: x's, bfloat16 if x is quantised.

    Returns:
        [rows, out].
    """
    source = x.values if isinstance(x, QuantizedRows) else x
    if dtype is None:
        dtype = torch.bfloat16 if isinstance(x, QuantizedRows) else x.dtype
    shape = (layout.rows, int(layers[0].out_features))  # type: ignore[arg-type]
    out = torch.empty(shape, dtype=dtype, device=source.device)
    parts = [(layout.image_rows, layers[0])]
    if layout.text:
        parts.append((layout.text_rows, layers[1]))
    int8 = [(rows, layer) for rows, layer in parts if isinstance(layer, Int8Linear)]
    if len(int8) == len(parts) and isinstance(x, Tensor):
        multiply_in_int8(int8, x, out)
    else:
        for rows, layer in parts:
            _apply(layer, x[rows], out[rows])
    if loras is not None and layers.side is not None:
        layers.side.add_(out, x, layout, loras)
    return out


def _apply(layer: nn.Module, x: Tensor | QuantizedRows, out: Tensor) -> None:
    if isinstance(layer, Fp8Linear) or (isinstance(layer, Int8Linear) and isinstance(x, Tensor)):
        layer(x, out=out)
    elif isinstance(layer, nn.Linear) and isinstance(x, Tensor):
        if layer.bias is None:
            torch.mm(x, layer.weight.t(), out=out)
        else:
            torch.addmm(layer.bias, x, layer.weight.t(), out=out)
    else:
        raise TypeError(f"{type(layer).__name__} cannot read {type(x).__name__}")


def int8_dtypes(
    x: Tensor | QuantizedRows, products: Iterable[Streams]
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return what is written between products and by the last of them, where all are INT8.

    Between them it is float32, which they read and write anyway; elsewhere both are None.
    """
    if isinstance(x, Tensor) and all(
        isinstance(each, Int8Linear) for of in products for each in of
    ):
        return torch.float32, x.dtype
    return None, None


def stacked(layers: Sequence[Linear]) -> Linear:
    """Return one layer whose output is those of all, side by side; all of one kind."""
    layers = agree_on_scale_(layers)
    if len(layers) == 1:
        return layers[0]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    fp8 = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    if fp8:
        alike = len({layer.arithmetic for layer in fp8}) == 1
        return Fp8Linear(
            _joined([layer.weight_fp8 for layer in fp8]),
            _joined([layer.weight_scale for layer in fp8]),
            bias,
            fp8[0].arithmetic if alike else "dequantize",
            fp8[0].input_scale,
        )
    return _linear(torch.cat([layer.weight for layer in layers if layer.weight is not None]), bias)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors one after the other: without a copy where that is how they lie in memory."""
    first = tensors[0]
    at = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.storage_offset() != at or not tensor.is_contiguous():
            return torch.cat(list(tensors))
        at += tensor.numel()
    rows = sum(len(tensor) for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def agree_on_scale_(layers: Sequence[Linear]) -> list[Linear]:
    """Give layers that read the same input one static scale, in place, and return them.

    It is the largest of theirs, with which nothing saturates that its own layer would have kept; or
    none if one of them has none: the input is then quantised dynamically for all.
    """
    fp8 = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    scales = [layer.input_scale for layer in fp8 if layer.input_scale is not None]
    largest = torch.stack(scales).max() if scales and len(scales) == len(fp8) else None
    for layer in fp8:
        layer.input_scale = largest
    return list(layers)


def plain(layer: Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a layer with its weight in an ordinary dtype where it was FP8."""
    if isinstance(layer, Fp8Linear):
        return _linear(layer.dequantized(dtype), layer.bias)
    return layer


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
