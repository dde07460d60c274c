"""The choice of number formats on the card of this machine, by itself and taken for others."""

import pytest
import torch

from deployments.sd3.card import Card
from deployments.sd3.fp8 import Fp8Arithmetic
from deployments.sd3.precision import choose_precision
from deployments.sd3.product_speed import Product, fp8_problem, product_ms
from serve.errors import ConfigurationError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

DEVICE = torch.device("cuda")


def _has_fp8_units() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.parametrize("arithmetic", ["dequantize", "scaled_mm", "unit_scaled_mm"])
def test_every_arithmetic_is_right_where_there_are_units(arithmetic: Fp8Arithmetic) -> None:
    problem = fp8_problem(arithmetic, DEVICE)
    if arithmetic == "dequantize" or _has_fp8_units():
        assert problem is None
    else:
        assert problem


def test_fp8_is_chosen_with_figures() -> None:
    choice = choose_precision("fp8", DEVICE)
    assert choice.weights == "fp8"
    assert (choice.fp8_arithmetic != "dequantize") == _has_fp8_units()
    assert torch.cuda.get_device_name() in choice.reason


@pytest.mark.parametrize("pretend", ["sm_80", "sm_86"])
def test_a_card_taken_for_an_older_one_uses_no_fp8_units(pretend: str) -> None:
    choice = choose_precision("fp8", DEVICE, pretend=pretend)
    assert choice.label == "fp8 weights, bf16 arithmetic"
    assert "not measured" in choice.reason


def test_a_model_far_too_large_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="do not fit"):
        choose_precision("auto", DEVICE, model_bytes_bf16=1 << 50)


def test_the_allocators_limit_is_the_end_of_memory() -> None:
    before = Card.of(DEVICE).usable_bytes
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        limited = Card.of(DEVICE).usable_bytes
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    assert limited <= 0.05 * total < before


def test_all_ways_are_timed_by_the_device() -> None:
    products: list[Product] = ["bf16", "dequantize"]
    if _has_fp8_units():
        products += ["scaled_mm", "unit_scaled_mm"]
    measured = product_ms(products, DEVICE)
    print({product: round(ms, 3) for product, ms in measured.items()})
    assert list(measured) == products
    assert all(0 < ms < 1000 for ms in measured.values())
