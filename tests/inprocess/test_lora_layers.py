"""A side branch beside a layer is the layer with its weights changed, for each row by itself."""

import pytest
import torch
from torch import nn

from deployments.sd3.lora_arena import LoraArena, LowRank, pages_of
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import PrecisionChoice
from loadtest.sd35 import config, random_inputs, random_transformer
from tests.vnni import NEEDS_VNNI

FP8_PRODUCTS = PrecisionChoice("fp8", "fp8", torch.bfloat16, "for these tests", "scaled_mm")
INT8_PRODUCTS = PrecisionChoice("fp8", "fp8", torch.bfloat16, "for these tests", "int8_mm")
FUSED_WEIGHTS = 1e-5  # of float32: the order of sums differs


def model(name: str = "tiny-dual"):
    return random_transformer(name, "cpu", torch.float32)


def drawn(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = random_inputs(config("tiny-dual"), rows, 8, 6, "cpu", text_tokens=5)
    return inputs.latents, inputs.sigmas, inputs.prompt_embeds, inputs.pooled


def lora(arena: LoraArena, rank: int, seed: int, only: str = "") -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            torch.randn(rank, branch.of.inputs, generator=generator) * branch.of.inputs**-0.5,
            torch.randn(columns, rank, generator=generator) * 0.3 * rank**-0.5,
        )
        for branch in arena.branches
        for stream in branch.of.names
        for name, columns in zip(stream, branch.of.columns, strict=True)
        if only in name
    }


def fused(*changes: tuple[dict[str, LowRank], float]):
    """The model with its weights changed."""
    changed = model()
    modules = dict(changed.named_modules())
    for layers, weight in changes:
        for name, layer in layers.items():
            linear = modules[name]
            assert isinstance(linear, nn.Linear)
            linear.weight.data += weight * (layer.up @ layer.down)
    return changed


def relative(ours, reference) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("optimizations", [Optimizations(), Optimizations(fused_qkv=False)])
def test_rows_are_adapted_each_by_its_own_as_if_weights_were_changed(optimizations):
    mmdit = Mmdit.from_diffusers(model(), "cpu", "fp32", optimizations)
    assert mmdit.lora_page_bytes() > 0
    arena = mmdit.make_room_for_loras(5)
    assert abs(arena.bytes / (5 * mmdit.lora_page_bytes()) - 1) < 0.01
    wide, narrow = lora(arena, 20, 0), lora(arena, 3, 1, only=".attn.to_")
    for page, content in zip((4, 1), arena.pack(wide), strict=True):
        arena.write(page, content)
    arena.write(2, arena.pack(narrow)[0])
    uses = [[(4, 0.7), (1, 0.7)], [(2, 1.5), (4, -0.5), (1, -0.5)], []]
    mixed = mmdit.velocity(*drawn(), uses)
    plain = mmdit.velocity(*drawn())
    changes: list[list[tuple[dict[str, LowRank], float]]]
    changes = [[(wide, 0.7)], [(narrow, 1.5), (wide, -0.5)], []]
    for row, change in enumerate(changes):
        expected = Mmdit.from_diffusers(fused(*change), "cpu", "fp32").velocity(*drawn())[row]
        assert relative(mixed[row], expected) < FUSED_WEIGHTS
        assert (relative(mixed[row], plain[row]) > 0.01) is bool(change)
    assert torch.equal(mixed[2], plain[2])


def test_everything_that_can_be_adapted_is_a_linear_of_the_blocks_and_all_of_them_are():
    mmdit = Mmdit.from_diffusers(model(), "cpu", "fp32")
    linears = {
        name
        for name, module in model().named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")
    }
    assert mmdit.make_room_for_loras(1).layers == linears


def test_a_page_that_is_filled_anew_holds_nothing_of_what_it_held():
    mmdit = Mmdit.from_diffusers(model(), "cpu", "fp32")
    arena = mmdit.make_room_for_loras(1)
    small = lora(arena, 2, 1, only="ff.net")
    arena.write(0, arena.pack(small)[0])
    first = mmdit.velocity(*drawn(), [[(0, 1.0)]] * 3)
    arena.write(0, arena.pack(lora(arena, 16, 0))[0])
    assert relative(mmdit.velocity(*drawn(), [[(0, 1.0)]] * 3), first) > 0.01
    arena.write(0, arena.pack(small)[0])
    assert torch.equal(mmdit.velocity(*drawn(), [[(0, 1.0)]] * 3), first)


def test_nan_of_one_rows_lora_stays_in_its_row():
    mmdit = Mmdit.from_diffusers(model(), "cpu", "fp32")
    arena = mmdit.make_room_for_loras(2)
    broken = {
        name: LowRank(layer.down * float("inf"), layer.up)
        for name, layer in lora(arena, 4, 0).items()
    }
    arena.write(1, arena.pack(broken)[0])
    mixed = mmdit.velocity(*drawn(), [[], [(1, 1.0)], []])
    plain = mmdit.velocity(*drawn())
    assert not torch.isfinite(mixed[1]).any()
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[2], plain[2])


@pytest.mark.parametrize(
    "products",
    [FP8_PRODUCTS, pytest.param(INT8_PRODUCTS, marks=NEEDS_VNNI)],
    ids=["fp8", "int8"],
)
def test_beside_products_of_a_byte_the_branch_errs_no_more_than_they_do(products):
    exact = Mmdit.from_diffusers(model(), "cpu", "fp32")
    exact_arena = exact.make_room_for_loras(1)
    layers = lora(exact_arena, 8, 0)
    exact_arena.write(0, exact_arena.pack(layers)[0])
    quantised = Mmdit.from_diffusers(model(), "cpu", products)
    arena = quantised.make_room_for_loras(1)
    arena.write(0, arena.pack(layers)[0])
    uses = [[(0, 1.0)]] * 3
    own = relative(quantised.velocity(*drawn()), exact.velocity(*drawn()))
    adapted = relative(quantised.velocity(*drawn(), uses), exact.velocity(*drawn(), uses))
    assert adapted < 1.2 * own
    assert relative(exact.velocity(*drawn(), uses), exact.velocity(*drawn())) > 5 * own


@pytest.mark.parametrize(("rank", "pages"), [(1, 1), (16, 1), (17, 2), (256, 16)])
def test_ranks_are_counted_in_sixteens(rank, pages):
    assert pages_of(rank) == pages
