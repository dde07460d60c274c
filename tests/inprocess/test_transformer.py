"""Our forward is diffusers' forward, on every shape of model that SD3.5 comes in."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import PrecisionChoice

FP8_IN_FLOAT32 = PrecisionChoice("fp8", "fp8", torch.float32, "for these tests")


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
