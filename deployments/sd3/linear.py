"""Linear layers of either kind, FP8 or plain, alone, stacked, or one for each stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deployments.sd3.fp8 import Fp8Linear, QuantizedRows
from deployments.sd3.stream_layout import StreamLayout

Linear = nn.Linear | Fp8Linear


def takes_quantized(layer: nn.Module) -> bool:
    """True if a layer multiplies in FP8, so that its input may come quantised."""
    return isinstance(layer, Fp8Linear) and layer.takes_quantized


def each_stream(layers: nn.ModuleList, x: Tensor | QuantizedRows, layout: StreamLayout) -> Tensor:
    """Apply the image's layer to the image rows and the text's to the text rows.

    Args:
        layers: One Linear, or two where the layout has text.
        x: [rows, in].
        layout: Of the rows.

    Returns:
        [rows, out], in x's dtype; bfloat16 if x is quantised.
    """
    source = x.values if isinstance(x, QuantizedRows) else x
    dtype = torch.bfloat16 if isinstance(x, QuantizedRows) else x.dtype
    shape = (layout.rows, int(layers[0].out_features))  # type: ignore[arg-type]
    out = torch.empty(shape, dtype=dtype, device=source.device)
    _apply(layers[0], x[layout.image_rows], out[layout.image_rows])
    if layout.text:
        _apply(layers[1], x[layout.text_rows], out[layout.text_rows])
    return out


def _apply(layer: nn.Module, x: Tensor | QuantizedRows, out: Tensor) -> None:
    if isinstance(layer, Fp8Linear):
        layer(x, out=out)
    elif isinstance(layer, nn.Linear) and isinstance(x, Tensor):
        if layer.bias is None:
            torch.mm(x, layer.weight.t(), out=out)
        else:
            torch.addmm(layer.bias, x, layer.weight.t(), out=out)


def stacked(layers: Sequence[Linear]) -> Linear:
    """Return one layer whose output is those of all, side by side; all of one kind."""
    if len(layers) == 1:
        return layers[0]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases) if biases else None
    fp8 = [layer for layer in layers if isinstance(layer, Fp8Linear)]
    if fp8:
        return Fp8Linear(
            torch.cat([layer.weight_fp8 for layer in fp8]),
            torch.cat([layer.weight_scale for layer in fp8]),
            bias,
            fp8[0].arithmetic,
        )
    return _linear(torch.cat([layer.weight for layer in layers if layer.weight is not None]), bias)


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
