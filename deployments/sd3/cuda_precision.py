"""The choice of number formats on NVIDIA cards: by what they can do, what fits, what is measured.

sm_89 and newer multiply FP8 weights on FP8 tensor cores. sm_80 and 86 cannot: they hold FP8 weights
and make them bfloat16 for each product, or hold bfloat16 where that fits and is faster. Two
replicas on like cards choose alike unless two ways are within some 3 % of each other; whoever needs
certainty there asks for `fp8` or `bf16` by name.
"""

from __future__ import annotations

from typing import Literal

import torch

from deployments.sd3.card import Card, gib
from deployments.sd3.fp8 import Fp8Arithmetic
from deployments.sd3.precision import PrecisionChoice, asked_for
from deployments.sd3.product_speed import TYPICAL, Product, fp8_problem, product_ms
from serve.errors import ConfigurationError

_SMALLEST_FP8_CAPABILITY = (8, 9)
_SMALLEST_BF16_CAPABILITY = (8, 0)

# Of the time of the slower way: less may be noise, and changes with every start.
_WORTH_IT = 0.97

# As a share of the weights in bf16: activations at 1024x1024 with guidance (Large's 2 GiB of 15),
# or, while loading, the FP8 modulation weights a second time (2.5).
_WORKING_SHARE = 1 / 6
_SIZE = {"fp8": 0.5, "bf16": 1.0, "fp32": 2.0}


def choose_on_cuda(
    requested: str,
    device: torch.device,
    *,
    pretend: str | None = None,
    fp8_arithmetic: Fp8Arithmetic | None = None,
    model_bytes_bf16: int | None = None,
) -> PrecisionChoice:
    """Choose number formats for a CUDA device; see `precision.choose_precision`."""
    card = Card.of(device, pretend)
    asked = asked_for(requested)
    if requested != "fp32" and card.capability < _SMALLEST_BF16_CAPABILITY:
        raise ConfigurationError(
            f"{card.words} has no bfloat16 units.",
            field="precision",
            value=requested,
            allowed="fp32 on this card, or a card of sm_80 or newer",
        )
    _check_fits("fp8" if requested == "auto" else requested, requested, card, model_bytes_bf16)
    if requested == "fp32":
        return PrecisionChoice("fp32", "fp32", torch.float32, asked + card.words)
    if requested == "bf16":
        return _bf16(asked + card.words, card)
    if fp8_arithmetic is not None:
        return _as_asked(fp8_arithmetic, asked, card, device)
    problem = "no FP8 tensor cores"
    if card.capability >= _SMALLEST_FP8_CAPABILITY:
        arithmetic, why = _fastest_fp8(card, device)
        if arithmetic is not None:
            return _fp8(f"{asked}{card.words} has FP8 tensor cores: {why}", card, arithmetic)
        problem = f"FP8 tensor cores, but this torch cannot use them ({why})"
    why = f"{asked}{card.words} has {problem}"
    if requested == "auto":
        faster, figures = _bf16_is_better(card, device, model_bytes_bf16)
        if faster:
            return _bf16(f"{why}; bf16 weights: {figures}", card)
        why = f"{why}; no bf16 weights: {figures}"
    return _fp8(f"{why}; FP8 weights in memory, made bfloat16 per product", card, "dequantize")


def _fastest_fp8(card: Card, device: torch.device) -> tuple[Fp8Arithmetic | None, str]:
    """Return the better of the arithmetics that work, and why; None if none does."""
    arithmetics: tuple[Literal["scaled_mm", "unit_scaled_mm"], ...] = (
        "scaled_mm",
        "unit_scaled_mm",
    )
    problems = {each: _problem(each, card, device) for each in arithmetics}
    working = [each for each in arithmetics if problems[each] is None]
    if not working:
        return None, "; ".join(f"{each}: {problem}" for each, problem in problems.items())
    if working == ["scaled_mm"]:
        return "scaled_mm", "scales by row and channel in the product"
    if working == ["unit_scaled_mm"]:
        return "unit_scaled_mm", (
            "scales by row and channel after the product, for in it this torch"
            f" {torch.__version__} cannot ({problems['scaled_mm']})"
        )
    measured = product_ms(arithmetics, device)
    if not measured:
        return "scaled_mm", "scales by row and channel in the product (no memory to measure in)"
    figures = (
        f"{measured['scaled_mm']:.3f} ms with scales by row and channel in the product,"
        f" {measured['unit_scaled_mm']:.3f} with them afterwards, for {TYPICAL}"
    )
    afterwards = measured["unit_scaled_mm"] < _WORTH_IT * measured["scaled_mm"]
    return ("unit_scaled_mm" if afterwards else "scaled_mm"), figures


def _problem(arithmetic: Fp8Arithmetic, card: Card, device: torch.device) -> str | None:
    # Before 2.12 the row-wise kernel of these chips works on the default stream whatever the
    # current one is (pytorch issue 177651): wrong or stuck once graphs are captured, and a trial
    # of one small product does not show it.
    if (
        arithmetic == "scaled_mm"
        and card.capability == (8, 9)
        and torch.torch_version.TorchVersion(torch.__version__) < "2.12"
    ):
        return "its row-wise product for sm_89 ignores the current stream before torch 2.12"
    return fp8_problem(arithmetic, device)


def _bf16_is_better(
    card: Card, device: torch.device, model_bytes_bf16: int | None
) -> tuple[bool, str]:
    """Say whether bf16 weights fit and are faster than FP8 ones made bfloat16, with figures."""
    if model_bytes_bf16 is None:
        return False, "the model's size is not known here"
    needs = _needs("bf16", model_bytes_bf16)
    if needs > card.usable_bytes:
        return False, _sizes("bf16", model_bytes_bf16, card) + " do not fit"
    products: tuple[Product, ...] = ("bf16", "dequantize")
    measured = product_ms(products, device)
    if not measured:
        return False, "no memory to measure in"
    figures = (
        f"{measured['bf16']:.3f} ms against {measured['dequantize']:.3f} with FP8 made bfloat16,"
        f" for {TYPICAL}; {_sizes('bf16', model_bytes_bf16, card)} fit"
    )
    return measured["bf16"] < _WORTH_IT * measured["dequantize"], figures


def _as_asked(
    arithmetic: Fp8Arithmetic, asked: str, card: Card, device: torch.device
) -> PrecisionChoice:
    problem = None
    if arithmetic == "int8_mm":
        problem = "that is for CPUs without fast units for floats"
    elif arithmetic != "dequantize":
        if card.capability < _SMALLEST_FP8_CAPABILITY:
            problem = "it has no FP8 tensor cores, which came with sm_89"
        else:
            problem = _problem(arithmetic, card, device)
    if problem is not None:
        raise ConfigurationError(
            f"{card.words} cannot multiply by {arithmetic}: {problem}.",
            field="fp8_arithmetic",
            value=arithmetic,
            allowed="dequantize, or none to choose by measurement",
        )
    return _fp8(f"{asked}{arithmetic} was asked for; {card.words}", card, arithmetic)


def _check_fits(weights: str, requested: str, card: Card, model_bytes_bf16: int | None) -> None:
    if model_bytes_bf16 is None or _needs(weights, model_bytes_bf16) <= card.usable_bytes:
        return
    fitting = [name for name in _SIZE if _needs(name, model_bytes_bf16) <= card.usable_bytes]
    more = f"{gib(_needs(weights, model_bytes_bf16))} of free memory"
    raise ConfigurationError(
        f"{_sizes(weights, model_bytes_bf16, card)} do not fit {card.words}.",
        field="precision",
        value=requested,
        allowed=" or ".join((*fitting, more)),
    )


def _needs(weights: str, model_bytes_bf16: int) -> float:
    return model_bytes_bf16 * (_SIZE[weights] + _WORKING_SHARE)


def _sizes(weights: str, model_bytes_bf16: int, card: Card) -> str:
    return (
        f"{gib(model_bytes_bf16 * _SIZE[weights])} of {weights} weights and"
        f" {gib(model_bytes_bf16 * _WORKING_SHARE)} to work in, of {gib(card.usable_bytes)} free,"
    )


def _bf16(reason: str, card: Card) -> PrecisionChoice:
    return PrecisionChoice("bf16", "bf16", torch.bfloat16, _noted(reason, card))


def _fp8(reason: str, card: Card, arithmetic: Fp8Arithmetic) -> PrecisionChoice:
    return PrecisionChoice("fp8", "fp8", torch.bfloat16, _noted(reason, card), arithmetic)


def _noted(reason: str, card: Card) -> str:
    return f"{reason} ({card.speed_note})" if card.speed_note else reason
