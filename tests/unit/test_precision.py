"""The choice of number formats always fits the machine and says why."""

import pytest
import torch

from deployments.sd3 import precision
from deployments.sd3.precision import choose_precision
from serve.errors import ConfigurationError


def _cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], problem: str | None = None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some card")
    monkeypatch.setattr(precision, "_row_wise_fp8_problem", lambda device: problem)


@pytest.mark.parametrize(
    ("bf16_units", "expected"), [(True, torch.bfloat16), (False, torch.float32)]
)
def test_a_cpu_keeps_fp8_and_computes_in_what_is_fast(monkeypatch, bf16_units, expected):
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: bf16_units)
    choice = choose_precision("auto", "cpu")
    assert (choice.weights, choice.compute_dtype) == ("fp8", expected)
    assert "bfloat16 units" in choice.reason


@pytest.mark.parametrize(
    ("capability", "arithmetic"),
    [((8, 0), "dequantize"), ((8, 6), "dequantize"), ((8, 9), "scaled_mm"), ((9, 0), "scaled_mm")],
)
def test_a_card_multiplies_fp8_where_it_can(monkeypatch, capability, arithmetic):
    _cuda(monkeypatch, capability)
    choice = choose_precision("auto", "cuda")
    assert choice.weights == "fp8"
    assert choice.fp8_arithmetic == arithmetic
    assert f"sm_{capability[0]}{capability[1]}" in choice.reason


def test_a_card_whose_torch_cannot_scale_rows_falls_back_and_says_so(monkeypatch):
    _cuda(monkeypatch, (8, 9), problem="not implemented")
    choice = choose_precision("fp8", "cuda")
    assert choice.fp8_arithmetic == "dequantize"
    assert "not implemented" in choice.reason


def test_a_card_without_bf16_is_refused_except_in_fp32(monkeypatch):
    _cuda(monkeypatch, (7, 5))
    with pytest.raises(ConfigurationError) as caught:
        choose_precision("auto", "cuda")
    assert "fp32" in str(caught.value.allowed)
    assert choose_precision("fp32", "cuda").name == "fp32"


def test_what_is_asked_for_is_given():
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        choice = choose_precision(name, "cpu")
        assert (choice.name, choice.weights, choice.compute_dtype) == (name, name, dtype)


@pytest.mark.parametrize(
    ("requested", "device", "field"), [("int8", "cpu", "precision"), ("auto", "meta", "device")]
)
def test_what_cannot_be_is_refused(requested, device, field):
    with pytest.raises(ConfigurationError) as caught:
        choose_precision(requested, device)
    assert caught.value.field == field


def test_a_part_without_fp8_weights_does_not_claim_them():
    choice = choose_precision("fp8", "cpu").without_fp8("a VAE has none")
    assert choice.weights != "fp8"
    assert choice.reason == "a VAE has none"
    assert choice.compute_dtype == choose_precision("fp8", "cpu").compute_dtype
