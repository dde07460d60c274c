"""FP8 storage: exact where it says exact, and no row ever feels another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deployments.sd3.fp8 import Fp8Linear, dequantize, quantize_per_channel


def _linear(inputs: int = 48, outputs: int = 32, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def test_every_code_decodes_to_its_value():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)[None]
    decoded = dequantize(codes, torch.ones(1), torch.float32)
    assert torch.equal(decoded, codes.float())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-30, 30))
def test_error_is_within_half_a_step_of_the_format(seed, exponent):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    quantised, scale = quantize_per_channel(weight)
    assert quantised.dtype == torch.float8_e4m3fn
    assert scale.shape == (5,)
    error = (dequantize(quantised, scale, torch.float32) - weight).abs()
    # 3 mantissa bits: 2**-4 of the value, or half the smallest subnormal for the tiniest.
    bound = torch.maximum(weight.abs() * 2**-4, scale[:, None] * 2**-10) * 1.001
    assert (error <= bound).all()


def test_largest_value_of_a_channel_is_exact_to_float32():
    weight = torch.randn(8, 16)
    quantised, scale = quantize_per_channel(weight)
    back = dequantize(quantised, scale, torch.float32)
    assert torch.allclose(back.abs().amax(1), weight.abs().amax(1), rtol=1e-6)


def test_rows_of_zeros_and_of_subnormals_survive():
    weight = torch.stack([torch.zeros(8), torch.full((8,), 1e-44), torch.ones(8)])
    quantised, scale = quantize_per_channel(weight)
    back = dequantize(quantised, scale, torch.float32)
    assert torch.isfinite(back).all()
    assert (back[0] == 0).all()
    assert torch.allclose(back[2], weight[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_a_dequantised_linear_bit_for_bit(dtype):
    linear = _linear()
    layer = Fp8Linear.from_linear(linear)
    x = torch.randn(3, 5, 48).to(dtype)
    weight = (layer.weight_fp8.float() * layer.weight_scale[:, None]).to(dtype)
    assert torch.equal(layer(x), F.linear(x, weight, linear.bias.to(dtype)))


def test_weight_stays_fp8_when_the_model_is_cast():
    model = nn.Sequential(Fp8Linear.from_linear(_linear())).to(torch.bfloat16)
    layer = model[0]
    assert isinstance(layer, Fp8Linear)
    assert layer.weight_fp8.dtype == torch.float8_e4m3fn
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("arithmetic", ["dequantize", "scaled_mm"])
def test_a_row_does_not_feel_its_neighbour(arithmetic):
    layer = Fp8Linear.from_linear(_linear(), arithmetic)
    x = torch.randn(4, 48).to(torch.bfloat16)
    poisoned = x.clone()
    poisoned[1] = float("nan")
    poisoned[2] *= 1e6
    before, after = layer(x), layer(poisoned)
    assert torch.equal(before[[0, 3]], after[[0, 3]])


def test_scaled_mm_is_close_to_dequantised():
    layer = Fp8Linear.from_linear(_linear(256, 64))
    x = torch.randn(32, 256).to(torch.bfloat16)
    exact = layer(x).float()
    layer.arithmetic = "scaled_mm"
    error = (layer(x).float() - exact).norm() / exact.norm()
    assert 0 < error < 0.04
