"""SD3.5's VAE encodes a start image on a card: within the memory planned, near float32."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deployments.sd3.precision import choose_precision
from deployments.sd3.vae import VaeDecoder
from loadtest.stage_memory import GIB, REAL, random_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def vae(precision: str) -> VaeDecoder:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    return random_decoder(device, choose_precision(precision, device), REAL["vae"], generator)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """A gradient with noise on it."""
    noise = np.random.default_rng(0).integers(0, 64, (height, width, 3), np.uint8)
    made: NDArray[np.uint8] = noise + np.linspace(0, 191, width).astype(np.uint8)[:, None]
    return made


@pytest.mark.parametrize(("height", "width"), [(512, 512), (1024, 1024), (768, 1344)])
def test_encoding_takes_no_more_than_was_planned(height, width):
    encoder = vae("bf16")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mean, std = encoder.encode(picture(height, width))
    peak = torch.cuda.max_memory_allocated() - before
    assert mean.shape == std.shape == (16, height // 8, width // 8)
    planned = encoder.shape.encoded_whole_bytes(height // 8, width // 8)
    assert peak <= planned


def test_2048x2048_is_encoded_in_three_gib():
    encoder = vae("bf16")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mean, _ = encoder.encode(picture(2048, 2048))
    assert mean.shape == (16, 256, 256)
    assert torch.cuda.max_memory_allocated() - before + encoder.resident_bytes <= 3 * GIB


def test_bfloat16_encodes_what_float32_does():
    """Shown: as near as bfloat16 comes over some thirty layers."""
    pixels = picture(256, 256)
    ours, exact = (vae(precision).encode(pixels)[0] for precision in ("bf16", "fp32"))
    assert np.linalg.norm(ours - exact) <= 0.05 * np.linalg.norm(exact)
