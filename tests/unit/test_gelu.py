"""GELU by a table is torch's own, for every number that bfloat16 has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from deployments.sd3.gelu import gelu
from deployments.sd3.stream_layout import StreamLayout

ALL = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("fused", [True, False])
def test_every_number_is_what_torch_makes_of_it(threads: int, fused: bool):
    x = ALL.view(256, 256)
    made = gelu(x, StreamLayout(1, 256, 0), quantize=False, fused=fused)
    assert isinstance(made, torch.Tensor)
    assert made.shape == x.shape
    torch.testing.assert_close(made, F.gelu(x, approximate="tanh"), rtol=0, atol=0, equal_nan=True)


def test_what_is_learnt_through_it_keeps_its_gradient():
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    made = gelu(x, StreamLayout(1, 4, 0), quantize=False, fused=True)
    assert isinstance(made, torch.Tensor)
    assert made.requires_grad


def test_for_an_int8_product_it_is_its_own_function_within_a_fraction_of_a_unit():
    x = torch.linspace(-12, 12, 4096).view(4, 1024)
    made = gelu(x, StreamLayout(1, 4, 0), quantize=False, fused=True, for_int8=True)
    assert isinstance(made, torch.Tensor)
    expected = F.gelu(x, approximate="tanh")
    assert not torch.equal(made, expected)
    assert (made - expected).abs().max() < 5e-4
    plain = gelu(x, StreamLayout(1, 4, 0), quantize=False, fused=False, for_int8=True)
    assert isinstance(plain, torch.Tensor)
    assert torch.equal(plain, expected)
