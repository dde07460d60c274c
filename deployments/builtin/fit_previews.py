"""Fit the linear latent-to-RGB map of a model's VAE: `python -m deployments.builtin.fit_previews`.

Encodes drawn scenes and solves least squares from their latents to the scenes shrunk by eight.
Writes `latent_rgb.json` into the model's folder, which `deployments.sd3.previews` reads, and
prints how much of the colours' variance the map explains on scenes it has not seen.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from deployments import builtin
from deployments.builtin.draw import draw
from deployments.builtin.sample import sample_example
from deployments.sd3.previews import FILE_NAME, LatentRgb

_SCENES: Final = 64
_DECIMALS: Final = 5


def fit(vae: AutoencoderKL, seed: int = 0, scenes: int = _SCENES) -> tuple[LatentRgb, float]:
    """Return the map and the share of variance (R squared) it explains on other scenes.

    Args:
        vae: In eval mode, on the CPU; its encoder is used.
        seed: Of the scenes.
        scenes: How many are fitted to; as many again are judged by.
    """
    latents, colours = _pairs(vae, seed, 2 * scenes)
    half = len(latents) // 2
    ones = torch.ones(len(latents), 1, dtype=torch.float64)
    inputs = torch.cat([latents, ones], dim=1)  # [pixels, channels + 1]
    weights = _weights(colours[:half])
    solution = torch.linalg.lstsq(weights * inputs[:half], weights * colours[:half]).solution
    error = (inputs[half:] @ solution - colours[half:]).square().sum()
    spread = (colours[half:] - colours[half:].mean(dim=0)).square().sum()
    rows = [
        (round(red, _DECIMALS), round(green, _DECIMALS), round(blue, _DECIMALS))
        for red, green, blue in solution.tolist()
    ]
    return LatentRgb(tuple(rows[:-1]), rows[-1]), 1 - float(error / spread)


def _weights(colours: Tensor) -> Tensor:
    """Return factors [pixels, 1] that let rare colours count.

    Backgrounds cover nine tenths of a scene; unweighted, a small red thing is drawn brown. Errors
    are weighted by the inverse square root of how often their colour occurs, on a grid of 9.
    """
    red, green, blue = ((colours + 1) * 4).round().clamp(0, 8).long().unbind(dim=1)
    code = red * 81 + green * 9 + blue
    return torch.bincount(code, minlength=729).double()[code].pow(-0.25)[:, None]


@torch.no_grad()
def _pairs(vae: AutoencoderKL, seed: int, scenes: int) -> tuple[Tensor, Tensor]:
    """Return latents [pixels, C] as samplers hold them and RGB in [-1, 1] [pixels, 3]."""
    rng = random.Random(seed)
    scaling, shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)
    latents, colours = [], []
    for index in range(scenes):
        scene = sample_example(rng, "core" if index % 2 else "hard").scene
        image = draw([scene]).double() / 127.5 - 1  # [1, 3, height, width]
        mean = vae.encode(image.float()).latent_dist.mean
        latents.append(((mean - shift) * scaling)[0].double())
        colours.append(functional.avg_pool2d(image, 8)[0])
    return tuple(  # type: ignore[return-value]
        torch.cat([part.flatten(1).T for part in parts]) for parts in (latents, colours)
    )


def write(folder: Path) -> float:
    """Fit the VAE in `folder/vae` and write the map beside it; return R squared."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    mapping, explained = fit(vae)
    stated = {"factors": mapping.factors, "bias": mapping.bias}
    (folder / FILE_NAME).write_text(json.dumps(stated) + "\n", encoding="utf-8")
    return explained


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(builtin.__path__[0]) / "weights"
    print(json.dumps({"file": str(given / FILE_NAME), "r_squared": round(write(given), 4)}))
