"""SD3.5's VAE compiled on a card: the same picture, within its plan."""

import copy

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


def test_it_is_as_near_the_truth_as_the_plain_one_and_stays_within_its_plan(decoder):
    sides = ((64, 64), (128, 96))
    generator = torch.Generator().manual_seed(1)
    given = {side: torch.randn(decoder.channels, *side, generator=generator) for side in sides}
    device = torch.device("cuda")
    exact = VaeDecoder(
        copy.deepcopy(decoder.model).float(), device, choose_precision("fp32", device)
    )
    truth = {side: exact.decode(latents).astype(np.int16) for side, latents in given.items()}
    del exact
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
        # Two ways of rounding to bf16: with random weights each errs by about a grey level.
        error, plain_error = (np.abs(each - truth[side]).mean() for each in (picture, plain[side]))
        assert 0 < error <= 1.2 * plain_error
