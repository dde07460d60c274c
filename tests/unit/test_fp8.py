"""FP8 storage: exact where it says exact, and no row ever feels another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from deployments.sd3.adaln import modulate
from deployments.sd3.fp8 import Fp8Linear, QuantizedRows, dequantize, quantize_per_channel
from deployments.sd3.gelu import gelu
from deployments.sd3.joint_layout import from_joint
from deployments.sd3.linear import Quantization, quantization
from deployments.sd3.stream_layout import PerStream, StreamLayout


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


def _with_input_scale(scale: float | None, arithmetic="scaled_mm", **sizes: int) -> Fp8Linear:
    layer = Fp8Linear.from_linear(_linear(**sizes), arithmetic)
    layer.input_scale = None if scale is None else torch.tensor(scale)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_a_dequantised_linear_bit_for_bit(dtype):
    linear = _linear()
    layer = Fp8Linear.from_linear(linear)
    x = torch.randn(3, 5, 48).to(dtype)
    weight = (layer.weight_fp8.float() * layer.weight_scale[:, None]).to(dtype)
    assert torch.equal(layer(x), F.linear(x, weight, linear.bias.to(dtype)))


def test_weight_stays_fp8_when_the_model_is_cast():
    layer = _with_input_scale(0.3)
    nn.Sequential(layer).to(torch.bfloat16)
    assert layer.input_scale == torch.tensor(0.3)
    assert layer.weight_fp8.dtype == torch.float8_e4m3fn
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("input_scale", [None, 3 / 448])
@pytest.mark.parametrize("arithmetic", ["dequantize", "scaled_mm"])
def test_a_row_does_not_feel_its_neighbour(arithmetic, input_scale):
    layer = _with_input_scale(input_scale, arithmetic)
    x = torch.randn(4, 48).to(torch.bfloat16)
    poisoned = x.clone()
    poisoned[1] = float("nan")
    poisoned[2] *= 1e6
    before, after = layer(x), layer(poisoned)
    assert torch.equal(before[[0, 3]], after[[0, 3]])
    assert after[1].isnan().all()


def test_scaled_mm_is_close_to_dequantised():
    layer = Fp8Linear.from_linear(_linear(256, 64))
    x = torch.randn(32, 256).to(torch.bfloat16)
    exact = layer(x).float()
    layer.arithmetic = "scaled_mm"
    error = (layer(x).float() - exact).norm() / exact.norm()
    assert 0 < error < 0.04


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.integers(-8, 8))
def test_a_static_scale_is_the_dynamic_one_where_both_are_the_same(seed, exponent):
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(seed))
    x = x / x.abs().amax(dim=1, keepdim=True) * 1.7 * 2.0**exponent
    x[:, 0] = 1.7 * 2.0**exponent  # exactly the largest of every row
    static = _with_input_scale(float(x[0, 0]) / 448)
    assert torch.equal(static(x), _with_input_scale(None)(x))


def test_what_exceeds_a_static_scale_saturates():
    layer = _with_input_scale(1 / 448)
    x = torch.randn(5, 48) * 3
    x[2, 7] = float("inf")
    assert torch.equal(layer(x), layer(x.clamp(-1, 1)))
    assert not torch.equal(layer(x), _with_input_scale(4 / 448)(x))


def test_dequantising_does_not_read_a_static_scale():
    x = torch.randn(5, 48)
    ours, theirs = (_with_input_scale(scale, "dequantize")(x) for scale in (1e-6, None))
    assert torch.equal(ours, theirs)


LAYOUT = StreamLayout(2, 6, 3)
PRODUCERS = {
    "modulate": lambda how: modulate(
        torch.randn(LAYOUT.rows, 48),
        LAYOUT,
        PerStream(torch.zeros(2, 48), torch.zeros(2, 48)),
        PerStream(torch.zeros(2, 48), torch.zeros(2, 48)),
        quantize=how,
        fused=False,
    ),
    "gelu": lambda how: gelu(torch.randn(LAYOUT.rows, 48), LAYOUT, quantize=how, fused=False),
    "from_joint": lambda how: from_joint(
        torch.randn(2, LAYOUT.tokens, 48), LAYOUT, quantize=how, fused=False
    ),
}


@pytest.mark.parametrize("producer", PRODUCERS.values(), ids=PRODUCERS)
def test_each_stream_is_quantised_by_its_own_constant(producer):
    torch.manual_seed(0)
    exact = producer(False)
    torch.manual_seed(0)
    rows = producer(Quantization(PerStream(torch.tensor(5 / 448), torch.tensor(0.5 / 448))))
    assert isinstance(rows, QuantizedRows)
    for at, largest in ((LAYOUT.image_rows, 5.0), (LAYOUT.text_rows, 0.5)):
        assert (rows.scale[at] == torch.tensor(largest / 448)).all()
        kept = exact[at].clamp(-largest, largest)
        error = (rows.values[at].float() * rows.scale[at] - kept).abs()
        assert (error <= kept.abs() * 2**-4 * 1.001 + largest / 448 * 2**-10).all()


def test_layers_say_how_their_input_is_quantised():
    static, dynamic = _with_input_scale(0.5), _with_input_scale(None)
    assert quantization([static, static]) == Quantization(
        PerStream(torch.tensor(0.5), torch.tensor(0.5))
    )
    assert quantization([static]) == Quantization(PerStream(torch.tensor(0.5), None))
    assert quantization([static, dynamic]) == Quantization()
    assert quantization([static, _with_input_scale(0.5, "dequantize")]) is False
    assert quantization([static, _linear()]) is False
