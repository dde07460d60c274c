"""Decoding: right shapes and dtypes, and no picture out of what is no number."""

import numpy as np
import pytest
import torch

from deployments.builtin.pico import write_pico
from deployments.sd3.vae import VaeDecoder
from serve.errors import StageFailed


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> VaeDecoder:
    model_dir = write_pico(tmp_path_factory.mktemp("model") / "pico", seed=0)
    return VaeDecoder.load(model_dir, "cpu", "auto")


def latents(decoder: VaeDecoder, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(decoder.channels, height, width)).astype("float32")


def test_pixels_have_eight_times_the_sides(decoder):
    pixels = decoder.decode(latents(decoder))
    assert pixels.shape == (32, 48, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.std() > 1


def test_the_same_latents_give_the_same_bytes_and_stay_as_they_were(decoder):
    given = latents(decoder)
    given.flags.writeable = False
    before = given.copy()
    assert np.array_equal(decoder.decode(given), decoder.decode(torch.from_numpy(before)))
    assert np.array_equal(given, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_are_refused(decoder, value):
    bad = latents(decoder)
    bad[3, 1, 2] = value
    with pytest.raises(StageFailed):
        decoder.decode(bad)
    assert decoder.decode(latents(decoder)).std() > 1


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 16, 4, 4), (16, 4)])
def test_latents_of_a_wrong_shape_are_refused(decoder, shape):
    with pytest.raises(StageFailed) as caught:
        decoder.decode(np.zeros(shape, np.float32))
    assert "16" in str(caught.value.allowed)


def test_the_encoder_is_not_kept_and_no_fp8_is_claimed(decoder):
    assert decoder.model.encoder is None
    assert decoder.precision.weights in ("bf16", "fp32")
    assert "no FP8 weights" in decoder.precision.reason
