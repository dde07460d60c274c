"""Tiled decoding against diffusers' own decoder, whole; and what is known of its memory before."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deployments.sd3 import tiled_layers
from deployments.sd3.channel_statistics import ChannelStatistics
from deployments.sd3.decode_plan import GIB, DecodePlan, DecoderShape, frugal_plan, plan_decode
from deployments.sd3.tiled_decode import decode_in_tiles
from serve.errors import StageFailed

SD35 = DecoderShape((128, 256, 512, 512), 2)
IN_TILES = DecodePlan(8, False, 0)


def build_decoder() -> nn.Module:
    """SD3.5's structure in small; every weight random, so that a skipped part shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(
            block_out_channels=(4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    decoder: nn.Module = model.decoder.eval().requires_grad_(False)
    return decoder


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return build_decoder()


def uneven(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Latents whose tiles differ in mean and spread, as those of pictures do."""
    noise = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(seed))
    across = torch.linspace(-2, 2, width)
    return noise * (1.2 + across.sign()) + across


@torch.inference_mode()
def error(decoder: nn.Module, latents: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
    """Difference to whole for every pixel, in parts of 255 of the picture's range."""
    whole = decoder(latents)
    tiled = decode_in_tiles(decoder, latents, plan)
    assert tiled.shape == whole.shape
    assert tiled.dtype == whole.dtype
    wrong: torch.Tensor = (tiled - whole).abs().float() / (whole.max() - whole.min()).float() * 255
    return wrong


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    tile=st.integers(5, 30),
    seed=st.integers(0, 100),
)
def test_tiles_of_any_size_give_what_whole_gives_at_every_pixel(decoder, height, width, tile, seed):
    plan = dataclasses.replace(IN_TILES, tile=tile)
    assert error(decoder, uneven(height, width, seed), plan).max() < 0.05


def test_a_seam_is_no_worse_than_the_rest(decoder):
    wrong = error(decoder, uneven(16, 16), dataclasses.replace(IN_TILES, tile=32))
    seams = torch.cat([wrong[..., 31::32, :].flatten(), wrong[..., 31::32].flatten()])
    assert seams.max() < 0.05


def test_bfloat16_stays_as_near_as_its_own_rounding(decoder):
    latents = uneven(8, 8)
    exact = decoder(latents)
    copy = build_decoder().to(torch.bfloat16)
    with torch.inference_mode():
        whole = (copy(latents.bfloat16()).float() - exact).abs().mean()
        tiled = decode_in_tiles(copy, latents.bfloat16(), IN_TILES)
        assert (tiled.float() - exact).abs().mean() < 1.5 * whole


def test_latents_stay_as_they_were_and_every_run_gives_the_same_bytes(decoder):
    latents = uneven(5, 7)
    before = latents.clone()
    with torch.inference_mode():
        first = decode_in_tiles(decoder, latents, IN_TILES)
        assert torch.equal(decode_in_tiles(decoder, latents, IN_TILES), first)
    assert torch.equal(latents, before)


def test_channels_last_weights_give_the_same(decoder):
    latents = uneven(6, 6)
    with torch.inference_mode():
        plain = decode_in_tiles(decoder, latents, IN_TILES)
        try:
            decoder.to(memory_format=torch.channels_last)
            other = decode_in_tiles(
                decoder, latents.contiguous(memory_format=torch.channels_last), IN_TILES
            )
        finally:
            decoder.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def test_attention_with_its_scores_in_parts_is_the_same(decoder, monkeypatch):
    latents = uneven(6, 6)
    with torch.inference_mode():
        plain = decode_in_tiles(decoder, latents, IN_TILES)
        monkeypatch.setattr(tiled_layers, "ATTENTION_PART_BYTES", 8 * 36 * 5)
        # As where no kernel takes heads so wide.
        monkeypatch.setattr(
            tiled_layers, "sdpa_kernel", lambda kernels: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        )
        other = decode_in_tiles(decoder, latents, IN_TILES)
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def test_a_plan_for_the_whole_is_refused(decoder):
    with pytest.raises(ValueError, match="without tiles"):
        decode_in_tiles(decoder, uneven(2, 2), DecodePlan(None, False, 0))


@given(
    cuts=st.lists(st.integers(1, 29), max_size=3, unique=True),
    mean=st.floats(-1000, 1000),
    spread=st.floats(0.1, 10),
)
def test_statistics_of_parts_are_those_of_the_whole(cuts, mean, spread):
    values = torch.randn(1, 8, 6, 30, generator=torch.Generator().manual_seed(1)) * spread + mean
    norm = nn.GroupNorm(4, 8).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 8))
    norm.bias.copy_(torch.linspace(-1, 1, 8))
    statistics = ChannelStatistics()
    for left, right in zip([0, *sorted(cuts)], [*sorted(cuts), 30], strict=True):
        statistics.add(values[..., left:right])
    expected = F.silu(F.group_norm(values.double(), 4, norm.weight.double(), norm.bias.double()))
    # What float32 keeps of a value that far from zero, over its spread.
    tolerance = 1e-5 + 4e-7 * abs(mean) / spread
    torch.testing.assert_close(
        statistics.normaliser(norm)(values).double(), expected, rtol=1e-4, atol=10 * tolerance
    )


def test_usual_sizes_are_decoded_whole_and_large_ones_in_tiles():
    budget = int(2.9 * GIB)
    assert plan_decode(SD35, 128, 128, budget).tile is None
    large = plan_decode(SD35, 256, 256, budget)
    assert large.tile is not None
    assert not large.on_host
    assert large.tile >= 128  # below that a card is not kept busy


def test_the_switches():
    assert plan_decode(SD35, 256, 256, GIB, "off").tile is None
    assert plan_decode(SD35, 8, 8, GIB, "always").tile is not None


@given(
    height=st.integers(2, 512),
    width=st.integers(2, 512),
    budget=st.floats(0.3, 20),
    more=st.floats(1, 3),
)
def test_a_plan_keeps_to_its_budget_and_more_memory_never_hurts(height, width, budget, more):
    memory = int(budget * GIB)
    if SD35.tiled_bytes(height, width, 32, on_host=True) > memory < SD35.whole_bytes(height, width):
        with pytest.raises(StageFailed) as refused:
            plan_decode(SD35, height, width, memory)
        assert "memory" in str(refused.value.allowed)
        return
    plan = plan_decode(SD35, height, width, memory)
    assert plan.device_bytes <= memory
    roomier = plan_decode(SD35, height, width, int(memory * more))
    assert roomier.tile is None or (plan.tile is not None and not roomier.on_host > plan.on_host)
    if plan.on_host:
        assert plan.host_bytes == SD35.kept_bytes(height, width)
        assert plan.tile is not None


def test_the_frugal_plan_takes_least(decoder):
    frugal = frugal_plan(SD35, 256, 256)
    assert frugal.on_host
    assert frugal.device_bytes < plan_decode(SD35, 256, 256, 3 * GIB).device_bytes / 2


def test_what_fits_in_no_way_is_refused_with_what_it_takes():
    with pytest.raises(StageFailed, match="GiB or more beside"):
        plan_decode(SD35, 256, 256, GIB // 4)
    with pytest.raises(StageFailed):
        plan_decode(SD35, 256, 256, -1)
