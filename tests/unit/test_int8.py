"""INT8 products err by the rounding of their factors only, and rows are computed by themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deployments.sd3 import int8 as int8_module
from deployments.sd3.fp8 import Fp8Linear
from deployments.sd3.int8 import Int8Linear, become_int8_, quantize_to_int8
from tests.vnni import NEEDS_VNNI

pytestmark = NEEDS_VNNI
BFLOAT16 = 2.0**-8  # what rounding to it errs by at most, relatively


def layers(inputs: int, outputs: int, bias: bool = True) -> tuple[Fp8Linear, Int8Linear]:
    torch.manual_seed(0)
    with torch.no_grad():
        fp8 = Fp8Linear.from_linear(nn.Linear(inputs, outputs, bias), "int8_mm")
        return fp8, Int8Linear(fp8)


@given(
    st.integers(1, 40), st.integers(2, 70), st.integers(1, 50), st.booleans(), st.integers(-9, 9)
)
def test_a_product_errs_by_half_a_unit_of_each_factor(rows, inputs, outputs, bias, exponent):
    fp8, int8 = layers(inputs, outputs, bias)
    x = torch.randn(rows, inputs) * 2.0**exponent
    weight = fp8.dequantized(torch.float32).double()
    exact = x.double() @ weight.t()
    unit_of_x = x.abs().amax(1, keepdim=True).double() / 127
    unit_of_weight = weight.abs().amax(1)[None] / 127
    allowed = (
        unit_of_x / 2 * weight.abs().sum(1)[None]
        + unit_of_weight / 2 * x.abs().double().sum(1, keepdim=True)
        + unit_of_x * unit_of_weight * inputs / 4
    )
    if fp8.bias is not None:
        exact += fp8.bias.double()
    off = (int8(x).double() - exact).abs()
    assert (off <= allowed * 1.001 + 1e-5 * exact.abs() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_it_writes_where_it_is_told_and_leaves_its_input(dtype, out_dtype):
    _, int8 = layers(48, 32)
    x = torch.randn(2, 5, 48).to(dtype)
    before = x.clone()
    out = torch.empty(10, 32, dtype=out_dtype)
    alone = int8(x)
    assert (alone.shape, alone.dtype) == ((2, 5, 32), dtype)
    assert int8(x, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(
        out.float(), alone.reshape(10, 32).float(), rtol=2 * BFLOAT16, atol=1e-6
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize(("threads", "columns"), [(1, 768), (2, 768), (2, 200), (5, 200)])
def test_a_row_has_the_same_bits_in_any_batch(threads, columns):
    _, int8 = layers(256, columns)
    x = torch.randn(672, 256)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = int8(x)
        for rows in (1, 2, 3, 80, 336):
            assert torch.equal(together[:rows], int8(x[:rows]))
    finally:
        torch.set_num_threads(before)


def test_a_weight_that_became_int8_in_parts_is_the_same(monkeypatch):
    _, whole = layers(48, 32)
    monkeypatch.setattr(int8_module, "_ROWS_AT_ONCE", 5)
    _, in_parts = layers(48, 32)
    assert torch.equal(in_parts.weight_int8, whole.weight_int8)
    assert torch.equal(in_parts.weight_scale, whole.weight_scale)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(poison):
    _, int8 = layers(48, 32)
    x = torch.randn(4, 48)
    poisoned = x.clone()
    poisoned[1, 5] = poison
    poisoned[2] *= 1e6
    before, after = int8(x), int8(poisoned)
    assert torch.equal(before[[0, 3]], after[[0, 3]])
    assert not after[1].isfinite().any()
    assert after[2].isfinite().all()


def test_rows_of_zeros_stay_zeros():
    _, int8 = layers(48, 32, bias=False)
    assert not int8(torch.zeros(3, 48)).any()
    with torch.no_grad():
        nothing = Fp8Linear.from_linear(nn.Linear(48, 32, bias=False), "int8_mm")
    nothing.weight_scale.zero_()
    assert not Int8Linear(nothing)(torch.randn(3, 48)).any()


def test_the_largest_of_a_row_is_the_largest_there_is():
    values, scale = quantize_to_int8(torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, -1e-3]]))
    assert values.tolist() == [[32, -127, 64], [127, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([[2.0], [3.0]]) / 127)


def test_only_layers_that_are_to_become_int8_become_it():
    with torch.no_grad():
        model = nn.Sequential(
            nn.Linear(16, 32),
            Fp8Linear.from_linear(nn.Linear(32, 32)),
            nn.Sequential(Fp8Linear.from_linear(nn.Linear(32, 48), "int8_mm")),
            Fp8Linear.from_linear(nn.Linear(48, 16), "scaled_mm"),
        )
    become_int8_(model)
    inner = model[2]
    assert isinstance(inner, nn.Sequential)
    kinds = [type(layer) for layer in (model[0], model[1], inner[0], model[3])]
    assert kinds == [nn.Linear, Fp8Linear, Int8Linear, Fp8Linear]
    assert inner[0].weight_int8.nbytes == 32 * 48
