"""Which ways to multiply by an FP8 weight are right on this device, and how fast they are.

Asked once, before a model is loaded. Row-wise scaling is missing or slow in some releases of torch
on some chips (pytorch issues 130359, 147971, 192707): only trying says what holds here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deployments.sd3.fp8 import Fp8Arithmetic, Fp8Linear, quantize_rows

Product = Literal["bf16", "dequantize", "scaled_mm", "unit_scaled_mm"]

_WARM_UPS = 3
_REPEATS = 15


@dataclass(frozen=True)
class ProductShape:
    """A linear layer and how many rows it is given."""

    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.inputs} x {self.outputs}"


# SD3.5 Large's widest layer. 1024x1024 with guidance gives it 8192 rows, 512x512 2048.
TYPICAL = ProductShape(rows=4096, inputs=2432, outputs=9728)


def fp8_problem(arithmetic: Fp8Arithmetic, device: torch.device) -> str | None:
    """Try one small product; return None if it is right, else what is wrong with it."""
    # Small whole numbers and powers of two, so that E4M3 holds them exactly; every row and channel
    # has a scale of its own, and neither count suits any tile.
    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = 277, 64, 48
    row_scale = 2.0 ** (torch.arange(rows) % 5)[:, None]
    weight_scale = 2.0 ** -(torch.arange(outputs) % 7).float()
    x = torch.randint(-2, 3, (rows, inputs), generator=generator) * row_scale
    weight = torch.randint(-2, 3, (outputs, inputs), generator=generator).float()
    bias = torch.randint(-8, 9, (outputs,), generator=generator).float()
    without_bias = (x @ weight.T) * weight_scale
    layer = Fp8Linear(weight.to(torch.float8_e4m3fn), weight_scale, bias, arithmetic).to(device)
    try:
        product = layer(x.to(device, torch.bfloat16)).float().cpu()
    except (RuntimeError, ValueError) as error:  # which of them, depends on the release
        return str(error).splitlines()[0]
    # bfloat16 rounds to 2**-8, here twice; FP8 units may sum to 2**-13 of the largest partial sum.
    allowed = 0.01 * (without_bias.abs() + bias.abs()) + 0.05 * row_scale * weight_scale
    right = (product - (without_bias + bias)).abs() <= allowed
    return None if bool(right.all()) else "a wrong product"


@torch.inference_mode()
def product_ms(
    products: Sequence[Product], device: torch.device, shape: ProductShape = TYPICAL
) -> dict[Product, float]:
    """Measure one linear layer made in several ways.

    The ways take turns, so that a clock that falls meanwhile falls for all. FP8 arithmetic is
    given rows already quantised: in the model that is fused into what makes them.

    Args:
        products: `bf16` is an ordinary layer, the others are `Fp8Linear`'s.
        device: Where.
        shape: Of the layer.

    Returns:
        Median milliseconds of each; empty if the device has no memory left to try in.
    """
    try:
        calls = {product: _call(product, device, shape) for product in products}
        for _ in range(_WARM_UPS):
            for call in calls.values():
                call()
        timers = {product: _Timer(device) for product in products}
        for _ in range(_REPEATS):
            for product, call in calls.items():
                timers[product].time(call)
        return {product: timer.median_ms() for product, timer in timers.items()}
    except torch.OutOfMemoryError:
        return {}


def _call(product: Product, device: torch.device, shape: ProductShape) -> Callable[[], Tensor]:
    # Speed, and the power it draws, depend on the numbers: zeros would flatter.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(
        shape.rows, shape.inputs, device=device, dtype=torch.bfloat16, generator=generator
    )
    weight = torch.randn(
        shape.outputs, shape.inputs, device=device, dtype=torch.bfloat16, generator=generator
    )
    bias = torch.zeros(shape.outputs, device=device, dtype=torch.bfloat16)
    if product == "bf16":
        return lambda: F.linear(x, weight, bias)
    scale = torch.full((shape.outputs,), 0.02, device=device)
    layer = Fp8Linear(weight.to(torch.float8_e4m3fn), scale, bias, product)
    if product == "dequantize":
        return lambda: layer(x)
    rows = quantize_rows(x)
    return lambda: layer(rows)


class _Timer:
    """The times of one call, by the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_ms: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Callable[[], Tensor]) -> None:
        if self._device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record(torch.cuda.current_stream(self._device))
            call()
            ended.record(torch.cuda.current_stream(self._device))
            self._events.append((began, ended))
        else:
            started = time.perf_counter()
            call()
            self._host_ms.append((time.perf_counter() - started) * 1000)

    def median_ms(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        device_ms = [float(began.elapsed_time(ended)) for began, ended in self._events]
        return median(device_ms + self._host_ms)
