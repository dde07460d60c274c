"""2048x2048 by SD3.5's VAE on a card: in 3 GiB, and the same picture as whole."""

import numpy as np
import pytest
import torch

from deployments.sd3.decode_plan import TilingSettings
from deployments.sd3.precision import choose_precision
from deployments.sd3.vae import VaeDecoder
from loadtest.stage_memory import GIB, REAL, random_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

SIDE = 2048 // 8  # of the latents


@pytest.fixture(scope="module")
def decoder() -> VaeDecoder:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    return random_decoder(device, choose_precision("bf16", device), REAL["vae"], generator)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Uneven: tiles that were normalised by themselves would differ."""
    noise = torch.randn(16, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return noise + torch.linspace(-2, 2, SIDE)


def peak_of(decoder: VaeDecoder, latents: torch.Tensor) -> tuple[np.ndarray, int]:
    """Return the picture, and the allocator's peak beside whatever else the process holds."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - decoder.resident_bytes
    picture = decoder.decode(latents)
    return picture, torch.cuda.max_memory_allocated() - others


def test_by_default_it_takes_three_gib_and_no_more_than_was_planned(decoder, latents):
    decoder.tiling = TilingSettings()
    plan = decoder.plan(SIDE, SIDE)
    assert plan.tile is not None
    picture, peak = peak_of(decoder, latents)
    assert picture.shape == (2048, 2048, 3)
    assert peak <= plan.device_bytes + decoder.resident_bytes
    assert peak <= 3 * GIB


def test_it_is_the_picture_that_whole_decoding_makes(decoder, latents):
    decoder.tiling = TilingSettings("off")
    if decoder.plan(SIDE, SIDE).device_bytes > torch.cuda.mem_get_info()[0]:
        pytest.skip("whole does not fit this card")
    whole = decoder.decode(latents).astype(np.int16)
    decoder.tiling = TilingSettings()
    assert np.abs(decoder.decode(latents) - whole).mean() <= 1


def test_with_activations_in_the_hosts_memory_it_takes_half_of_that(decoder, latents):
    decoder.tiling = TilingSettings()
    picture, _ = peak_of(decoder, latents)
    decoder.tiling = TilingSettings("auto", int(1.5 * GIB))
    plan = decoder.plan(SIDE, SIDE)
    assert plan.on_host
    other, peak = peak_of(decoder, latents)
    assert peak <= 1.5 * GIB
    assert np.abs(other.astype(np.int16) - picture).mean() <= 1


def test_memory_that_neighbours_took_makes_tiles_of_a_picture_that_was_whole(decoder):
    """As when a denoiser shares the card: what is free is asked before every picture."""
    decoder.tiling = TilingSettings()
    assert decoder.plan(128, 128).tile is None
    torch.cuda.empty_cache()  # what the allocator keeps would be free for the picture too
    free, _ = torch.cuda.mem_get_info()
    neighbour = torch.empty(max(0, free - 2 * GIB), dtype=torch.uint8, device="cuda")
    try:
        assert decoder.plan(128, 128).tile is not None
        latents = torch.randn(16, 128, 128, generator=torch.Generator().manual_seed(2))
        assert decoder.decode(latents).shape == (1024, 1024, 3)
    finally:
        del neighbour
        torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [(1024, 1024), (1344, 768)])
def test_usual_sizes_stay_whole_and_within_their_plan(decoder, size):
    decoder.tiling = TilingSettings()
    height, width = size[1] // 8, size[0] // 8
    plan = decoder.plan(height, width)
    assert plan.tile is None
    _, peak = peak_of(decoder, torch.randn(16, height, width))
    assert peak <= plan.device_bytes + decoder.resident_bytes
