"""The choice of number formats always fits the machine and says why."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from deployments.sd3 import cuda_precision, precision
from deployments.sd3.fp8 import dequantize
from deployments.sd3.precision import as_choice, choose_precision
from deployments.sd3.product_speed import Product, ProductShape, fp8_problem, product_ms
from deployments.sd3.weight_sizes import bf16_bytes
from serve.errors import ConfigurationError

GIB = 1 << 30
LARGE = 15 * GIB
CPU = torch.device("cpu")


class World:
    """A machine with one simulated card: what CUDA, a trial and a stopwatch would answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability = (9, 0)
        self.free = 79 * GIB
        self.limit = 1.0  # the allocator's, as a share of the card
        self.problems: dict[str, str] = {}
        self.ms = {"scaled_mm": 0.14, "unit_scaled_mm": 0.18, "bf16": 2.8, "dequantize": 2.9}
        self.measured: list[tuple[str, ...]] = []
        cuda = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_capability": lambda device: self.capability,
            "get_device_name": lambda device: "Some card",
            "mem_get_info": lambda device: (self.free, 80 * GIB),
            "memory_allocated": lambda device: 0,
            "memory_reserved": lambda device: 0,
            "get_per_process_memory_fraction": lambda device: self.limit,
        }
        for name, answer in cuda.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
        monkeypatch.setattr(
            cuda_precision, "fp8_problem", lambda arithmetic, device: self.problems.get(arithmetic)
        )
        monkeypatch.setattr(cuda_precision, "product_ms", self._product_ms)

    def _product_ms(self, products, device):
        self.measured.append(tuple(products))
        return {product: self.ms[product] for product in products if self.ms}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


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
def test_a_card_multiplies_fp8_where_it_can(world, capability, arithmetic):
    world.capability = capability
    choice = choose_precision("auto", "cuda")
    assert choice.weights == "fp8"
    assert choice.fp8_arithmetic == arithmetic
    assert f"sm_{capability[0]}{capability[1]}" in choice.reason


@pytest.mark.parametrize(
    ("row_wise", "afterwards", "expected"),
    [(1.0, 1.2, "scaled_mm"), (1.0, 0.98, "scaled_mm"), (1.0, 0.9, "unit_scaled_mm")],
)
def test_scales_are_applied_where_it_is_measurably_faster(world, row_wise, afterwards, expected):
    world.ms = {"scaled_mm": row_wise, "unit_scaled_mm": afterwards}
    choice = choose_precision("auto", "cuda")
    assert choice.fp8_arithmetic == expected
    assert f"{row_wise:.3f}" in choice.reason
    assert f"{afterwards:.3f}" in choice.reason


def test_a_card_whose_torch_cannot_scale_rows_scales_afterwards_and_says_so(world):
    world.problems = {"scaled_mm": "not implemented"}
    choice = choose_precision("fp8", "cuda")
    assert choice.fp8_arithmetic == "unit_scaled_mm"
    assert "not implemented" in choice.reason
    assert choice.label != choose_precision("fp8", "cuda", fp8_arithmetic="dequantize").label


def test_a_card_whose_torch_has_no_fp8_product_dequantises_and_says_so(world):
    world.problems = {"scaled_mm": "not implemented", "unit_scaled_mm": "a wrong product"}
    choice = choose_precision("auto", "cuda")
    assert choice.fp8_arithmetic == "dequantize"
    assert "not implemented" in choice.reason
    assert "a wrong product" in choice.reason


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("2.11.0+cu130", (8, 9), "unit_scaled_mm"),
        ("2.12.1+cu130", (8, 9), "scaled_mm"),
        ("2.11.0+cu130", (9, 0), "scaled_mm"),
    ],
)
def test_row_wise_products_that_ignore_the_stream_are_never_used(
    monkeypatch, world, version, capability, expected
):
    monkeypatch.setattr(torch, "__version__", version)
    world.capability = capability
    choice = choose_precision("auto", "cuda")
    assert choice.fp8_arithmetic == expected
    assert ("stream" in choice.reason) == (expected == "unit_scaled_mm")


@pytest.mark.parametrize(
    ("bf16_ms", "free_gib", "weights"),
    [(2.8, 22, "fp8"), (2.5, 22, "bf16"), (2.5, 17, "fp8"), (2.5, 18, "bf16")],
)
def test_without_fp8_units_bf16_is_taken_where_it_fits_and_is_faster(
    world, bf16_ms, free_gib, weights
):
    world.capability, world.free = (8, 6), free_gib * GIB
    world.ms = {"bf16": bf16_ms, "dequantize": 2.85}
    choice = choose_precision("auto", "cuda", model_bytes_bf16=LARGE)
    assert choice.weights == weights
    assert "15.0 GiB of bf16 weights" in choice.reason
    if world.measured:
        assert f"{bf16_ms:.3f} ms against 2.850" in choice.reason
    else:
        assert "do not fit" in choice.reason


def test_a_limit_on_the_allocator_counts_as_the_end_of_memory(world):
    world.capability, world.ms = (8, 6), {"bf16": 1.0, "dequantize": 2.0}
    assert choose_precision("auto", "cuda", model_bytes_bf16=LARGE).weights == "bf16"
    world.limit = 16 / 80
    assert choose_precision("auto", "cuda", model_bytes_bf16=LARGE).weights == "fp8"


def test_fp8_asked_for_by_name_is_not_traded_for_bf16(world):
    world.capability, world.ms = (8, 6), {"bf16": 1.0, "dequantize": 2.0}
    assert choose_precision("fp8", "cuda", model_bytes_bf16=LARGE).weights == "fp8"


@pytest.mark.parametrize(
    ("requested", "free_gib", "allowed"), [("bf16", 16, "fp8"), ("fp32", 24, "bf16")]
)
def test_weights_that_do_not_fit_are_refused_with_figures(world, requested, free_gib, allowed):
    world.free = free_gib * GIB
    with pytest.raises(ConfigurationError) as caught:
        choose_precision(requested, "cuda", model_bytes_bf16=LARGE)
    assert f"{free_gib}.0 GiB" in caught.value.message
    assert allowed in str(caught.value.allowed)
    assert choose_precision(requested, "cuda").weights == requested  # of a size unknown


def test_even_fp8_may_not_fit(world):
    world.free = 8 * GIB
    with pytest.raises(ConfigurationError, match=r"7\.5 GiB of fp8 weights"):
        choose_precision("auto", "cuda", model_bytes_bf16=LARGE)


def test_a_newer_card_can_be_taken_for_an_older_one(world):
    world.ms = {"bf16": 2.9, "dequantize": 2.9}
    choice = choose_precision("auto", "cuda", pretend="sm_86", model_bytes_bf16=LARGE)
    assert choice.fp8_arithmetic == "dequantize"
    assert "(sm_90) taken for sm_86" in choice.reason


@pytest.mark.parametrize("pretend", ["sm_90", "ada", "sm_8"])
def test_a_card_is_not_taken_for_what_it_cannot_be(world, pretend):
    world.capability = (8, 9)
    with pytest.raises(ConfigurationError) as caught:
        choose_precision("auto", "cuda", pretend=pretend)
    assert caught.value.field == "pretend"


@pytest.mark.parametrize(
    ("capability", "pretend", "measured"),
    [((9, 0), None, True), ((9, 0), "sm_89", False), ((8, 6), None, False), ((8, 9), None, False)],
)
def test_speeds_nobody_measured_are_marked(world, capability, pretend, measured):
    world.capability = capability
    reason = choose_precision("auto", "cuda", pretend=pretend).reason
    assert ("not measured" not in reason) == measured


def test_fp8_arithmetic_can_be_named_where_the_card_has_it(world):
    for arithmetic in ("dequantize", "scaled_mm", "unit_scaled_mm"):
        choice = choose_precision("fp8", "cuda", fp8_arithmetic=arithmetic)
        assert choice.fp8_arithmetic == arithmetic
        assert arithmetic in choice.reason
    assert world.measured == []


@pytest.mark.parametrize(
    ("requested", "arithmetic", "capability", "said"),
    [
        ("fp8", "scaled_mm", (8, 6), "no FP8 tensor cores"),
        ("auto", "unit_scaled_mm", (8, 0), "no FP8 tensor cores"),
        ("fp8", "scaled_mm", (9, 0), "not implemented"),
        ("bf16", "scaled_mm", (9, 0), "bf16 weights were asked for"),
    ],
)
def test_fp8_arithmetic_that_cannot_be_is_refused(world, requested, arithmetic, capability, said):
    world.capability = capability
    world.problems = {"scaled_mm": "not implemented"}
    with pytest.raises(ConfigurationError, match=said):
        choose_precision(requested, "cuda", fp8_arithmetic=arithmetic)


def test_nothing_is_chosen_by_a_measurement_that_found_no_memory(world):
    world.ms = {}
    assert choose_precision("auto", "cuda").fp8_arithmetic == "scaled_mm"
    world.capability = (8, 6)
    assert choose_precision("auto", "cuda", model_bytes_bf16=LARGE).weights == "fp8"


def test_a_card_without_bf16_is_refused_except_in_fp32(world):
    world.capability = (7, 5)
    with pytest.raises(ConfigurationError) as caught:
        choose_precision("auto", "cuda")
    assert "fp32" in str(caught.value.allowed)
    assert choose_precision("fp32", "cuda").name == "fp32"


def test_what_is_asked_for_is_given():
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        choice = choose_precision(name, "cpu")
        assert (choice.name, choice.weights, choice.compute_dtype) == (name, name, dtype)


@pytest.mark.parametrize(
    ("requested", "device", "pretend", "field"),
    [
        ("int8", "cpu", None, "precision"),
        ("auto", "meta", None, "device"),
        ("auto", "cpu", "sm_86", "pretend"),
    ],
)
def test_what_cannot_be_is_refused(requested, device, pretend, field):
    with pytest.raises(ConfigurationError) as caught:
        choose_precision(requested, device, pretend=pretend)
    assert caught.value.field == field


def test_a_part_without_fp8_weights_does_not_claim_them():
    choice = choose_precision("fp8", "cpu").without_fp8("a VAE has none")
    assert choice.weights != "fp8"
    assert choice.reason == "a VAE has none"
    assert choice.fp8_arithmetic == "dequantize"


@pytest.mark.parametrize(
    ("maker", "vnni", "amx", "arithmetic", "of_a_vae"),
    [
        ("GenuineIntel", True, False, "int8_mm", torch.float32),
        ("GenuineIntel", True, True, "dequantize", torch.bfloat16),
        ("GenuineIntel", False, False, "dequantize", torch.bfloat16),
        ("AuthenticAMD", True, False, "dequantize", torch.bfloat16),
    ],
)
def test_a_cpu_multiplies_in_int8_where_it_is_slow_at_bfloat16(
    monkeypatch, maker, vnni, amx, arithmetic, of_a_vae
):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"vendor_id : {maker}")
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    choice = choose_precision("auto", "cpu")
    assert (choice.weights, choice.fp8_arithmetic) == ("fp8", arithmetic)
    assert ("int8" in choice.label) == ("VNNI" in choice.reason) == (arithmetic == "int8_mm")
    assert choice.without_fp8("a VAE has none").compute_dtype == of_a_vae
    of_text = choice.without_int8()
    assert (of_text.weights, of_text.fp8_arithmetic) == ("fp8", "dequantize")
    assert "int8" not in of_text.label
    assert "INT8" not in of_text.reason
    asked = choose_precision("fp8", "cpu", fp8_arithmetic="dequantize")
    assert asked.fp8_arithmetic == "dequantize"


def test_int8_products_are_for_cpus_whose_sums_of_them_are_right(monkeypatch, world):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ConfigurationError, match="VNNI") as caught:
        choose_precision("fp8", "cpu", fp8_arithmetic="int8_mm")
    assert (caught.value.field, caught.value.value) == ("fp8_arithmetic", "int8_mm")
    with pytest.raises(ConfigurationError, match="cannot multiply by int8_mm"):
        choose_precision("fp8", "cuda", fp8_arithmetic="int8_mm")


def test_the_size_of_a_component_is_read_from_its_headers(tmp_path: Path, world):
    weight = torch.zeros(48, 64).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale": torch.ones(48), "b.bias": torch.zeros(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert bf16_bytes(tmp_path) == 2 * (48 * 64 + 7)
    world.capability, world.ms = (8, 6), {"bf16": 1.0, "dequantize": 2.0}
    assert as_choice("auto", torch.device("cuda"), tmp_path).weights == "bf16"
    assert as_choice("auto", torch.device("cuda")).weights == "fp8"


def test_a_cpu_multiplies_in_fp8_only_as_it_can():
    assert choose_precision("fp8", "cpu", fp8_arithmetic="scaled_mm").fp8_arithmetic == "scaled_mm"
    with pytest.raises(ConfigurationError) as caught:
        choose_precision("fp8", "cpu", fp8_arithmetic="unit_scaled_mm")
    assert caught.value.field == "fp8_arithmetic"


@pytest.mark.parametrize("arithmetic", ["dequantize", "scaled_mm"])
def test_the_trial_accepts_a_right_product(arithmetic):
    assert fp8_problem(arithmetic, CPU) is None


def test_the_trial_finds_products_that_are_wrong(monkeypatch):
    right = torch._scaled_mm

    def absent(*args, **kwargs):
        raise ValueError("Rowwise scaling is not supported\non your device")

    def lacks_a_row(*args, **kwargs):
        out = right(*args, **kwargs)
        out[-1] = 0
        return out

    def swaps_channels(*args, **kwargs):
        out = right(*args, **kwargs)
        return out.copy_(out.roll(1, dims=1))

    for wrong in (lacks_a_row, swaps_channels):
        monkeypatch.setattr(torch, "_scaled_mm", wrong)
        assert fp8_problem("scaled_mm", CPU) == "a wrong product"
    monkeypatch.setattr(torch, "_scaled_mm", absent)
    assert fp8_problem("scaled_mm", CPU) == "Rowwise scaling is not supported"


def test_every_way_of_multiplying_is_timed():
    products: tuple[Product, ...] = ("bf16", "dequantize", "scaled_mm")
    measured = product_ms(products, CPU, ProductShape(rows=16, inputs=32, outputs=48))
    assert tuple(measured) == products
    assert all(ms > 0 for ms in measured.values())


def test_no_memory_to_measure_in_is_no_failure(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "randn", full)
    assert product_ms(("bf16",), CPU, ProductShape(16, 32, 48)) == {}


def _value(code: int) -> float:
    """What an E4M3 code means, by the format's definition (arXiv 2209.05433, table 1)."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if exponent == 0:
        return math.copysign(mantissa * 2.0**-9, sign)
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


@given(scale=st.floats(2.0**-120, 2.0**100, width=32))
def test_shifted_bits_are_the_value_times_the_scale_rounded_once(scale):
    # The same bit arithmetic as in the kernel for cards without FP8 units.
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    weight = torch.tensor([codes], dtype=torch.uint8).view(torch.float8_e4m3fn)
    # Exact in double: 4 bits times 24.
    exact = torch.tensor([[_value(code) * scale for code in codes]], dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        found = dequantize(weight, torch.tensor([scale]), dtype)
        expected = exact.to(torch.float32).to(dtype)
        assert torch.equal(found, expected)
        assert torch.equal(found.signbit(), expected.signbit())
