"""Decoding: right shapes and dtypes, within its memory, and no picture out of what is no number."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import deployments.builtin
from deployments.builtin.dequantise import dequantized_directory
from deployments.builtin.pico import write_pico
from deployments.builtin.world import draw, sample_example
from deployments.sd3 import vae as vae_module
from deployments.sd3.decode_plan import DecodePlan, TilingSettings, plan_encode
from deployments.sd3.tiled_decode import decode_in_tiles
from deployments.sd3.tiled_encode import encode_in_tiles
from deployments.sd3.vae import VaeDecoder
from serve.errors import StageFailed

BUILTIN = Path(deployments.builtin.__file__).parent / "weights"
PICTURE = 512  # pixels a side


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


def test_no_fp8_is_claimed(decoder):
    assert decoder.precision.weights in ("bf16", "fp32")
    assert "no FP8 weights" in decoder.precision.reason


@pytest.mark.parametrize("shape", [(32, 48), (0, 16, 3), (20, 16, 3), (16, 16, 4)])
def test_start_images_of_a_wrong_shape_are_refused(decoder, shape):
    with pytest.raises(StageFailed) as caught:
        decoder.encode(np.zeros(shape, np.uint8))
    assert caught.value.field == "init_image"


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize(("height", "width", "tile"), [(64, 96, 16), (48, 112, 32), (32, 32, 24)])
def test_a_start_image_in_tiles_is_encoded_as_whole(decoder, height, width, tile, on_host):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    encoder = copy.deepcopy(decoder.model.encoder).float()
    plan = DecodePlan(tile, on_host, 0)
    with torch.inference_mode():
        whole, tiled = encoder(image), encode_in_tiles(encoder, image, plan)
    assert tiled.shape == whole.shape
    assert float((tiled - whole).abs().max()) <= 1e-4 * float(whole.abs().max())


def test_what_does_not_fit_whole_is_encoded_in_tiles_and_what_never_fits_is_refused(decoder):
    pixels = np.random.default_rng(1).integers(0, 256, (128, 128, 3), np.uint8)
    whole = decoder.shape.encoded_whole_bytes(16, 16)
    assert plan_encode(decoder.shape, 16, 16, whole - 1).tile is not None

    def encoded(room: int) -> np.ndarray:
        settings = TilingSettings("auto", decoder.resident_bytes + room)
        parts = decoder.model, decoder.device, decoder.precision, settings
        return VaeDecoder(*parts).encode(pixels)[0]

    tiled, exact = encoded(whole - 1), encoded(whole)
    assert np.linalg.norm(tiled - exact) <= 0.02 * np.linalg.norm(exact)
    with pytest.raises(StageFailed, match="Encoding .* may be used"):
        encoded(1 << 10)


@pytest.fixture(scope="module")
def scene_latents(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """A drawn scene as the built-in VAE encodes it, scaled as a denoiser leaves latents."""
    plain = dequantized_directory(BUILTIN, tmp_path_factory.mktemp("plain") / "m", torch.float32)
    vae = AutoencoderKL.from_pretrained(plain / "vae", dtype=torch.float32).eval()
    example = sample_example(random.Random(5), "hard", "train", PICTURE, PICTURE)
    with torch.inference_mode():
        encoded = vae.encode(draw([example.scene]).float() / 127.5 - 1).latent_dist.mode()
    scaled = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
    found: np.ndarray = scaled[0].numpy()
    return found


def little(decoder: VaeDecoder, height: int, width: int) -> int:
    """Return the bytes that are just enough for latents of these sides in small tiles."""
    return decoder.resident_bytes + decoder.shape.tiled_bytes(height, width, 32, on_host=False)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1), ("bf16", 4)])
def test_a_picture_in_tiles_is_the_picture_whole(scene_latents, precision, most):
    decoder = VaeDecoder.load(BUILTIN, "cpu", precision)
    sides = scene_latents.shape[1:]
    assert decoder.plan(*sides).tile is None
    whole = decoder.decode(scene_latents).astype(int)
    assert whole.std() > 20
    decoder.tiling = TilingSettings("auto", little(decoder, *sides))
    tile = decoder.plan(*sides).tile
    assert tile is not None
    assert tile < PICTURE
    wrong = np.abs(decoder.decode(scene_latents).astype(int) - whole)
    # The promise is 1/255 on average away from edges; no part of the picture is left out here.
    assert wrong.mean() < 0.25
    seams = np.concatenate([wrong[tile - 1 :: tile].ravel(), wrong[:, tile - 1 :: tile].ravel()])
    assert seams.mean() < 0.25
    assert wrong.max() <= most


def test_a_picture_that_fits_in_no_way_is_refused_and_the_next_one_is_decoded(decoder, monkeypatch):
    monkeypatch.setattr(decoder, "tiling", TilingSettings("auto", decoder.resident_bytes))
    with pytest.raises(StageFailed, match="GiB"):
        decoder.decode(latents(decoder))
    monkeypatch.undo()
    assert decoder.decode(latents(decoder)).std() > 1


def test_whole_that_runs_out_of_memory_is_tried_in_tiles(monkeypatch, tmp_path):
    decoder = VaeDecoder.load(write_pico(tmp_path / "pico", seed=0), "cpu", "fp32")
    given = latents(decoder, 16, 16)
    whole = decoder.decode(given).astype(int)
    tiles: list[object] = []
    in_tiles_ = decode_in_tiles

    def runs_out(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def counted(*args: Any) -> torch.Tensor:
        tiles.append(args)
        return in_tiles_(*args)

    monkeypatch.setattr(decoder.model, "decode", runs_out)
    monkeypatch.setattr(vae_module, "decode_in_tiles", counted)
    assert np.abs(decoder.decode(given).astype(int) - whole).max() <= 1
    assert len(tiles) == 1
    monkeypatch.setattr(decoder, "tiling", TilingSettings("off"))
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode(given)


def test_float16_files_are_not_computed_in_float16(tmp_path):
    model_dir = write_pico(tmp_path / "pico", seed=0)
    (path,) = (model_dir / "vae").glob("*.safetensors")
    halved = {name: tensor.half() for name, tensor in load_file(path).items()}
    # What overflows float16 within the decoder, and neither of the others.
    halved["decoder.conv_in.weight"] = halved["decoder.conv_in.weight"] * 1e4
    save_file(halved, path)
    for precision in ("bf16", "fp32"):
        decoder = VaeDecoder.load(model_dir, "cpu", precision)
        assert decoder.precision.compute_dtype != torch.float16
        assert decoder.decode(latents(decoder) * 100).std() > 1
