"""The linear map itself: shapes, ranges, whose it is, and what a folder may state."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deployments.sd3.previews import FILE_NAME, SD3, LatentRgb, latents_to_rgb
from serve.errors import ConfigurationError

TWO = LatentRgb(((1.0, 0.0, 0.0), (0.0, 0.5, -1.0)), (0.0, -1.0, 1.0))


def test_channels_become_colours():
    latents = torch.zeros(2, 2, 3)
    latents[:, 0, 1] = torch.tensor([-1.0, 4.0])
    latents[:, 1, 2] = torch.tensor([100.0, -100.0])
    rgb = latents_to_rgb(latents, TWO)
    assert (rgb.shape, str(rgb.dtype), rgb.flags.c_contiguous) == ((2, 3, 3), "uint8", True)
    assert rgb[0, 0].tolist() == [128, 0, 255]  # zeros are the bias
    assert rgb[0, 1].tolist() == [0, 255, 0]
    assert rgb[1, 2].tolist() == [255, 0, 255]  # cut off, not wrapped around


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_will_do(dtype):
    latents = torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(0))
    same = latents.to(dtype)
    assert np.array_equal(latents_to_rgb(same), latents_to_rgb(same.float(), SD3))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 16, 8, 8), (16, 8)])
def test_latents_of_another_kind_are_refused(shape):
    with pytest.raises(ValueError, match="16 channels"):
        latents_to_rgb(torch.zeros(shape))


def test_a_folder_states_its_map_or_has_sd3s(tmp_path: Path):
    assert LatentRgb.of_model(tmp_path) is SD3
    stated = {"factors": [[1, 0, 0], [0, 0.5, -1]], "bias": [0, -1, 1]}
    (tmp_path / FILE_NAME).write_text(json.dumps(stated))
    assert LatentRgb.of_model(tmp_path) == TWO


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"factors": [[1, 2]], "bias": [0, 0, 0]}',
        '{"factors": [[1, 2, "x"]], "bias": [0, 0, 0]}',
        '{"factors": [[1, 2, 3]], "bias": [0, NaN, 0]}',
        '{"factors": 7, "bias": [0, 0, 0]}',
        '{"factors": ["abc"], "bias": [0, 0, 0]}',
        "no JSON",
    ],
)
def test_a_file_that_is_no_map_is_refused_by_name(tmp_path: Path, text: str):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        LatentRgb.of_model(tmp_path)
    assert FILE_NAME in str(caught.value.value) + caught.value.message


def test_a_map_is_copied_to_the_device_once(monkeypatch):
    own = LatentRgb(((0.25, 0.5, 0.75),))
    copies: list[object] = []
    real = torch.tensor

    def noted(data: object) -> torch.Tensor:
        copies.append(data)
        return real(data)

    monkeypatch.setattr(torch, "tensor", noted)
    for _ in range(3):
        with torch.inference_mode():
            latents_to_rgb(torch.zeros(1, 2, 2), own)
    assert len(copies) == 2  # factors and bias
    latents = torch.zeros(1, 2, 2, requires_grad=True)
    with torch.no_grad():
        latents_to_rgb(latents, own)
