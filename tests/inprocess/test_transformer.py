"""Our forward is diffusers' forward, on every shape of model that SD3.5 comes in."""

import re

import pytest
import torch
from diffusers import SD3Transformer2DModel

from deployments.sd3.fp8 import Fp8Linear, quantize_linears
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.unpacked_weights import unpack_weights_
from tests.vnni import NEEDS_VNNI

FP8_IN_FLOAT32 = PrecisionChoice("fp8", "fp8", torch.float32, "for these tests")
INT8_PRODUCTS = PrecisionChoice("fp8", "fp8", torch.bfloat16, "for these tests", "int8_mm")
FP8_PRODUCTS = PrecisionChoice("fp8", "fp8", torch.bfloat16, "for these tests", "scaled_mm")


def random_model(qk_norm: str | None, dual_attention_layers: tuple[int, ...]):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=64,
        pooled_projection_dim=40,
        pos_embed_max_size=12,
        qk_norm=qk_norm,
        dual_attention_layers=dual_attention_layers,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def drawn(rows: int = 3, height: int = 8, width: int = 6):
    torch.manual_seed(1)
    return (
        torch.randn(rows, 16, height, width),
        torch.linspace(0.05, 1.0, rows),
        torch.randn(rows, 5, 24),
        torch.randn(rows, 40),
    )


@torch.inference_mode()
def diffusers_velocity(model, latents, sigmas, prompt_embeds, pooled) -> torch.Tensor:
    velocity: torch.Tensor = model(
        hidden_states=latents,
        timestep=sigmas * 1000,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
    ).sample
    return velocity


def relative(ours, reference) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("optimizations", [Optimizations(), Optimizations(fused_qkv=False)])
@pytest.mark.parametrize("dual_attention_layers", [(), (0, 1)], ids=["large", "medium"])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize(("rows", "height", "width"), [(1, 8, 8), (3, 4, 24), (2, 24, 2)])
def test_velocity_is_diffusers_own(
    qk_norm, dual_attention_layers, optimizations, rows, height, width
):
    inputs = drawn(rows, height, width)
    expected = diffusers_velocity(random_model(qk_norm, dual_attention_layers), *inputs)
    model = random_model(qk_norm, dual_attention_layers)
    ours = Mmdit.from_diffusers(model, "cpu", "fp32", optimizations).velocity(*inputs)
    assert relative(ours, expected) < 1e-5


def test_inputs_are_left_as_they_were():
    inputs = drawn()
    before = [each.clone() for each in inputs]
    Mmdit.from_diffusers(random_model("rms_norm", (0,)), "cpu", "fp32").velocity(*inputs)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


def test_bfloat16_errs_no_more_than_diffusers_does():
    inputs = drawn()
    exact = diffusers_velocity(random_model("rms_norm", (0,)), *inputs)
    rounded = random_model("rms_norm", (0,)).bfloat16()
    theirs = diffusers_velocity(
        rounded, inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16(), inputs[3].bfloat16()
    )
    ours = Mmdit.from_diffusers(random_model("rms_norm", (0,)), "cpu", "bf16").velocity(*inputs)
    assert relative(ours, exact) <= 1.1 * relative(theirs.float(), exact)


@pytest.mark.parametrize("fp8_modulation", [True, False])
def test_fp8_weights_err_by_their_rounding_only(fp8_modulation):
    inputs = drawn()
    reference = random_model("rms_norm", (0,))
    for linear in reference.transformer_blocks.modules():
        if isinstance(linear, torch.nn.Linear):
            largest = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 448
            codes = (linear.weight.detach() / largest).to(torch.float8_e4m3fn)
            linear.weight.data = codes.float() * largest
    expected = diffusers_velocity(reference, *inputs)
    ours = Mmdit.from_diffusers(
        random_model("rms_norm", (0,)),
        "cpu",
        FP8_IN_FLOAT32,
        Optimizations(fp8_modulation=fp8_modulation),
    )
    assert relative(ours.velocity(*inputs), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacked_weights_give_the_same_bits_and_take_the_memory_for_it(dtype):
    precision = PrecisionChoice("fp8", "fp8", dtype, "for this test")
    packed, unpacked = (
        Mmdit.from_diffusers(
            random_model("rms_norm", (0,)), "cpu", precision, Optimizations(unpacked_weights=unpack)
        )
        for unpack in (False, True)
    )
    assert torch.equal(packed.velocity(*drawn()), unpacked.velocity(*drawn()))
    assert unpacked.resident_bytes > 1.5 * packed.resident_bytes


@NEEDS_VNNI
@pytest.mark.parametrize("optimizations", [Optimizations(), Optimizations(fused_qkv=False)])
def test_int8_products_err_no_more_than_fp8_products(optimizations):
    inputs = drawn()
    exact = diffusers_velocity(random_model("rms_norm", (0,)), *inputs)
    fp8, int8 = (
        Mmdit.from_diffusers(random_model("rms_norm", (0,)), "cpu", precision, optimizations)
        for precision in (FP8_PRODUCTS, INT8_PRODUCTS)
    )
    assert relative(int8.velocity(*inputs), exact) <= relative(fp8.velocity(*inputs), exact)
    assert int8.resident_bytes < 1.1 * fp8.resident_bytes


def test_switched_off_int8_products_are_dequantised_ones_bit_for_bit():
    dequantised, switched_off = (
        Mmdit.from_diffusers(
            random_model("rms_norm", (0,)), "cpu", precision, Optimizations(int8_products=False)
        )
        for precision in (
            PrecisionChoice("fp8", "fp8", torch.bfloat16, "for this test"),
            INT8_PRODUCTS,
        )
    )
    assert torch.equal(dequantised.velocity(*drawn()), switched_off.velocity(*drawn()))


@NEEDS_VNNI
def test_a_row_of_int8_products_has_the_same_bits_in_any_batch():
    mmdit = Mmdit.from_diffusers(random_model("rms_norm", (0,)), "cpu", INT8_PRODUCTS)
    inputs = drawn(4)
    together = mmdit.velocity(*inputs)
    for rows in (1, 2, 3):
        assert torch.equal(together[:rows], mmdit.velocity(*(each[:rows] for each in inputs)))


def test_weights_stay_packed_where_unpacked_ones_take_too_much():
    model = torch.nn.Sequential(Fp8Linear.from_linear(torch.nn.Linear(16, 32)))
    assert not unpack_weights_(model, torch.bfloat16, most_bytes=1023)
    assert isinstance(model[0], Fp8Linear)
    assert unpack_weights_(model, torch.bfloat16, most_bytes=1024)
    assert isinstance(model[0], torch.nn.Linear)


def test_layers_that_multiply_in_fp8_stay_packed():
    model = torch.nn.Sequential(Fp8Linear.from_linear(torch.nn.Linear(16, 32), "scaled_mm"))
    unpack_weights_(model, torch.bfloat16)
    assert isinstance(model[0], Fp8Linear)


def largest_inputs() -> dict[str, float]:
    """The largest value that each Linear of the blocks reads, as calibration would find it."""
    model = random_model("rms_norm", (0,))
    found: dict[str, float] = {}

    def note(name: str):
        def hook(_, inputs):
            found[name] = float(inputs[0].abs().max())

        return hook

    for name, module in model.transformer_blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(note(name))
    diffusers_velocity(model, *drawn())
    return found


def fp8_velocity(scales: dict[str, float], optimizations=Optimizations(), inputs=None):  # noqa: B008
    """Velocity by FP8 products; layers that `scales` names have static scales."""
    model = random_model("rms_norm", (0,))
    quantize_linears(model.transformer_blocks, "scaled_mm")
    for name, scale in scales.items():
        layer = model.transformer_blocks.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        layer.input_scale = torch.tensor(scale)
    mmdit = Mmdit.from_diffusers(model, "cpu", FP8_PRODUCTS, optimizations)
    return mmdit.velocity(*(inputs or drawn()))


def test_calibrated_static_scales_err_little_more_than_dynamic_ones():
    exact = diffusers_velocity(random_model("rms_norm", (0,)), *drawn())
    scales = {name: largest / 448 for name, largest in largest_inputs().items()}
    static, dynamic = fp8_velocity(scales), fp8_velocity({})
    assert not torch.equal(static, dynamic)
    assert relative(static, exact) < 1.5 * relative(dynamic, exact)


@pytest.mark.parametrize(
    "readers",
    [
        ".norm1",  # modulation, one matrix of all
        "0.attn.to_[qkv]",
        "0.attn.add_[qkv]_proj",
        "0.attn2.to_[qkv]",
        "1.attn.to_out.0",
        "1.attn.to_add_out",
        "1.ff.net.0.proj",
        "1.ff_context.net.0.proj",
        "2.ff.net.2",
        "1.ff_context.net.2",
    ],
)
def test_every_static_scale_is_read(readers):
    scales = {name: largest / 448 for name, largest in largest_inputs().items()}
    small = {name: scale / 50 for name, scale in scales.items() if re.search(readers, name)}
    assert small
    assert not torch.equal(fp8_velocity(scales | small), fp8_velocity(scales))


@pytest.mark.parametrize("fused_qkv", [True, False])
def test_layers_that_read_the_same_take_the_largest_scale(fused_qkv):
    scales = {name: largest / 448 for name, largest in largest_inputs().items()}
    ordinary = fp8_velocity(scales, Optimizations(fused_qkv=fused_qkv))
    differing = scales | {f"0.attn.to_{which}": scales["0.attn.to_q"] / 9 for which in "qk"}
    assert torch.equal(fp8_velocity(differing, Optimizations(fused_qkv=fused_qkv)), ordinary)


@pytest.mark.parametrize("fused_qkv", [True, False])
@pytest.mark.parametrize(
    "some",
    [
        ["0.attn.to_q", "0.attn.to_k", "0.attn.add_q_proj", "0.attn.add_k_proj"],
        ["0.ff.net.0.proj", "1.ff.net.2", "1.attn.to_add_out"],  # of one stream alone
        ["0.norm1.linear", "1.norm1.linear", "1.norm1_context.linear"],
    ],
)
def test_static_scales_that_only_some_have_are_not_used(some, fused_qkv):
    on = Optimizations(fused_qkv=fused_qkv)
    found = fp8_velocity(dict.fromkeys(some, 1e-3), on)
    assert torch.equal(found, fp8_velocity({}, on))


def test_with_static_scales_a_row_of_nonsense_stays_alone():
    scales = {name: largest / 448 for name, largest in largest_inputs().items()}
    latents, *rest = drawn()
    expected = fp8_velocity(scales, inputs=(latents, *rest))
    for nonsense in (float("nan"), float("inf"), 1e30):
        spoiled = latents.clone()
        spoiled[1] = nonsense
        velocity = fp8_velocity(scales, inputs=(spoiled, *rest))
        assert torch.equal(velocity[[0, 2]], expected[[0, 2]])
        assert not torch.equal(velocity[1], expected[1])


def test_weights_are_held_once():
    plain = Mmdit.from_diffusers(random_model("rms_norm", ()), "cpu", "fp32").resident_bytes
    parameters = sum(p.numel() for p in random_model("rms_norm", ()).parameters())
    positions = 12 * 12 * 64
    assert plain == 4 * (parameters + positions)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_row_of_nonsense_leaves_its_neighbours_bit_for_bit(precision):
    mmdit = Mmdit.from_diffusers(random_model("rms_norm", (0,)), "cpu", precision)
    latents, *rest = drawn()
    expected = mmdit.velocity(latents, *rest)
    for nonsense in (float("nan"), float("inf"), 1e30):
        spoiled = latents.clone()
        spoiled[1] = nonsense
        velocity = mmdit.velocity(spoiled, *rest)
        assert torch.equal(velocity[[0, 2]], expected[[0, 2]])
        assert not torch.equal(velocity[1], expected[1])


def test_preparing_changes_nothing_on_a_cpu():
    mmdit = Mmdit.from_diffusers(random_model("rms_norm", ()), "cpu", "fp32")
    mmdit.prepare(8, 6, 5, 3)
    assert mmdit.path(8, 6, 5, 3) == "eager"
    assert mmdit.attention_backend(8, 6, 5, 3) == "sdpa"
