"""SD3.5's VAE compiled on a card: the same picture, within its plan."""

import numpy as np
import pytest
import torch

from deployments.sd3.precision import choose_precision
from deployments.sd3.vae import VaeDecoder
from loadtest.stage_memory import REAL, random_decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.fixture
def decoder() -> VaeDecoder:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    return random_decoder(device, choose_precision("bf16", device), REAL["vae"], generator)


def test_it_is_the_plain_picture_and_stays_within_its_plan(decoder):
    sides = ((64, 64), (128, 96))
    generator = torch.Generator().manual_seed(1)
    given = {side: torch.randn(decoder.channels, *side, generator=generator) for side in sides}
    plain = {side: decoder.decode(latents) for side, latents in given.items()}
    for side in sides:
        prepared = decoder.prepare(*side)
        assert prepared is not None
        assert prepared.is_compiled, prepared
    for side, latents in given.items():
        plan = decoder.plan(*side)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - decoder.resident_bytes
        picture = decoder.decode(latents)
        peak = torch.cuda.max_memory_allocated() - others
        assert peak <= plan.device_bytes + decoder.resident_bytes
        assert np.abs(picture.astype(np.int16) - plain[side]).mean() <= 1
