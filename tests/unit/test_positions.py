"""A table of positions continues as it began, and what it was made for stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

import deployments.builtin
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.positions import continued_positions
from serve.errors import ConfigurationError

WEIGHTS = Path(deployments.builtin.__path__[0]) / "weights"


def table(side: int, base: int, width: int) -> torch.Tensor:
    made: torch.Tensor = get_2d_sincos_pos_embed(width, side, base_size=base, output_type="pt")
    return made.float()[None]


def test_it_goes_on_as_diffusers_would_have_made_it():
    # Half of the larger table's patches a side are its base: the same distance of neighbours.
    small, large = table(12, 6, 64), table(24, 12, 64)
    made = continued_positions(small, 24, 0.5)
    # Its places begin at -3 instead of 0: waves of a sum, so turned by the same angle everywhere.
    middle = made.view(24, 24, 64)[6:18, 6:18]
    torch.testing.assert_close(middle.reshape(1, 144, 64), small, rtol=0, atol=0)
    neighbours = (made.view(24, 24, 64)[0, 1:] * made.view(24, 24, 64)[0, :-1]).sum(1)
    expected = (large.view(24, 24, 64)[0, 1:] * large.view(24, 24, 64)[0, :-1]).sum(1)
    # What two places have in common depends on their distance alone, at the edge as within.
    torch.testing.assert_close(neighbours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [11, 13, 8])
def test_sizes_that_do_not_fit_are_refused(side: int):
    with pytest.raises(ConfigurationError):
        continued_positions(table(12, 6, 64), side, 0.5)


def test_a_table_that_was_learnt_is_not_continued():
    with pytest.raises(ConfigurationError, match="no sines and cosines"):
        continued_positions(torch.randn(1, 144, 64), 24, 0.5)


def test_the_built_in_model_draws_four_times_its_size_and_its_own_sizes_as_before():
    mmdit = Mmdit.load(WEIGHTS, "cpu", "fp32")
    assert mmdit.largest_side * 8 == 1024
    embed = mmdit._transformer.pos_embed
    latents = torch.zeros(1, 16, 128, 128)
    tokens = embed(latents)
    assert tokens.shape == (1, 64 * 64, 256)
    own = embed(latents[:, :, :32, :32]).detach().numpy()
    whole = tokens.view(64, 64, 256)[24:40, 24:40].reshape(1, 256, 256).detach().numpy()
    np.testing.assert_array_equal(own, whole)
