"""All randomness of a request, from its seed alone."""

from __future__ import annotations

import torch
from torch import Tensor


def request_generator(seed: int) -> torch.Generator:
    """Return the generator of a request; always on the CPU, so every device sees the same noise.

    Args:
        seed: 0 to 2**64 - 1.
    """
    return torch.Generator("cpu").manual_seed(seed)


def initial_latents(generator: torch.Generator, channels: int, height: int, width: int) -> Tensor:
    """Draw the noise a run starts from.

    Equal to what `StableDiffusion3Pipeline(generator=torch.Generator("cpu")...)` draws.

    Args:
        generator: Of the request.
        channels: Of the latents.
        height: Of the latents (pixels / 8).
        width: Of the latents.

    Returns:
        float32 [channels, height, width] on the CPU.
    """
    return torch.randn((1, channels, height, width), generator=generator)[0]
