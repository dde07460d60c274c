"""Cheap previews: a linear map from latent channels to RGB, one pixel a latent.

A VAE keeps colour nearly linear in its latents, so 16 x 3 numbers show what a picture will be at
an eighth of its size, for a thousandth of what decoding costs. The numbers belong to a VAE:
SD3.5's are published by its makers, and a model folder with another VAE states its own in
`latent_rgb.json` (`python -m deployments.builtin.fit_previews FOLDER` writes it).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deployments.device_errors import is_sticky
from deployments.sd3.stored_tensors import read_json
from serve.errors import ConfigurationError

FILE_NAME: Final = "latent_rgb.json"

Rgb = tuple[float, float, float]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentRgb:
    """`RGB = latents @ factors + bias`, RGB from -1 to 1, latents as the sampler holds them."""

    factors: tuple[Rgb, ...]  # one row a latent channel
    bias: Rgb = (0.0, 0.0, 0.0)

    @classmethod
    def of_model(cls, model_dir: Path | str) -> LatentRgb:
        """Return the map of a model's VAE: what its folder states, else SD3.5's.

        Args:
            model_dir: In Diffusers layout.

        Raises:
            ConfigurationError: `latent_rgb.json` is there and is not such a map.
        """
        path = Path(model_dir) / FILE_NAME
        if not path.exists():
            return SD3
        stated = read_json(path)
        try:
            rows = tuple(_rgb(row) for row in stated["factors"])
            return cls(rows, _rgb(stated["bias"]))
        except (KeyError, TypeError, ValueError):
            raise ConfigurationError(
                f"The model's {FILE_NAME} holds no linear map.",
                field="model.path",
                value=str(path),
                allowed='{"factors": [[R, G, B], one a latent channel], "bias": [R, G, B]}',
            ) from None


def latents_to_rgb(latents: Tensor, mapping: LatentRgb | None = None) -> NDArray[np.uint8]:
    """Return a picture at latent resolution.

    Args:
        latents: [C, h, w] on any device, scaled as the sampler holds them. While sampling give the
            denoised estimate, `latents - sigma * velocity`: the latents themselves are mostly noise
            until late.
        mapping: Of the model's VAE; SD3.5's if None.

    Returns:
        uint8 [h, w, 3], on the host.

    Raises:
        ValueError: The map is for another number of channels.
    """
    mapping = mapping or SD3
    if latents.dim() != 3 or latents.shape[0] != len(mapping.factors):
        raise ValueError(
            f"latents {list(latents.shape)} do not fit a map of {len(mapping.factors)} channels"
        )
    factors, bias = _on_device(mapping, latents.device)
    image = torch.einsum("chw,cr->hwr", latents.float(), factors) + bias
    pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.cpu().numpy())


@lru_cache(maxsize=8)
def _on_device(mapping: LatentRgb, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy a map once, not for every preview; float32 [C, 3] and [3]."""
    # Whoever comes first may be in inference mode, others need not be.
    with torch.inference_mode(False):
        return torch.tensor(mapping.factors).to(device), torch.tensor(mapping.bias).to(device)


class Previewer:
    """Shows what pictures will be for as long as that works: no picture fails for its preview.

    Args:
        mapping: Of the model's VAE; SD3.5's if None.
        channels: Of the model's latents.

    Raises:
        ConfigurationError: The model's folder states a map for another number of channels.
    """

    def __init__(self, mapping: LatentRgb | None, channels: int) -> None:
        self._mapping = mapping or SD3
        self._works = len(self._mapping.factors) == channels
        # SD3.5's stands in where a folder states none; such a model only has no previews.
        if not self._works and self._mapping is not SD3:
            raise ConfigurationError(
                f"The model's {FILE_NAME} is for latents of {len(self._mapping.factors)} channels,"
                f" and the model's have {channels}.",
                field="model.path",
                value=len(self._mapping.factors),
                allowed=f"{channels} rows of factors",
            )

    def show(self, denoised: Tensor) -> NDArray[np.uint8] | None:
        """Return a picture as `latents_to_rgb` does, or None once that has failed.

        Raises:
            RuntimeError: The device is lost.
        """
        if not self._works:
            return None
        try:
            return latents_to_rgb(denoised, self._mapping)
        except Exception as error:
            if is_sticky(error):
                raise
            self._works = False
            _log.exception("previews do not work and are left out from now on")
            return None


def _rgb(row: object) -> Rgb:
    if not isinstance(row, list | tuple):
        raise TypeError(f"not a row of three numbers: {row!r}")
    red, green, blue = (float(value) for value in row)
    if not np.isfinite([red, green, blue]).all():
        raise ValueError(f"not finite: {row!r}")
    return red, green, blue


# Coefficients published with the reference implementation of SD3.5 (Stability AI, repository
# sd3.5, sd3_impls.py, SD3LatentFormat.decode_latent_to_preview; MIT licence). They apply to scaled
# latents, before the VAE's scaling and shift are undone, which is how samplers hold them.
SD3: Final = LatentRgb(
    (
        (-0.0645, 0.0177, 0.1052),
        (0.0028, 0.0312, 0.0650),
        (0.1848, 0.0762, 0.0360),
        (0.0944, 0.0360, 0.0889),
        (0.0897, 0.0506, -0.0364),
        (-0.0020, 0.1203, 0.0284),
        (0.0855, 0.0118, 0.0283),
        (-0.0539, 0.0658, 0.1047),
        (-0.0057, 0.0116, 0.0700),
        (-0.0412, 0.0281, -0.0039),
        (0.1106, 0.1171, 0.1220),
        (-0.0248, 0.0682, -0.0481),
        (0.0815, 0.0846, 0.1207),
        (-0.0120, -0.0055, -0.0867),
        (-0.0749, -0.0634, -0.0456),
        (-0.1418, -0.1457, -0.1259),
    )
)
