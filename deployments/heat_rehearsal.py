"""A model whose forwards take longer than they must: the rehearsal of a throttled card.

Only a scripted source of heat asks for it (`cluster.scripted_heat`). The time is slept away, so
that several rehearsed cards share the cores of one machine without slowing one another down.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from deployments.live_request import VelocityModel
from deployments.payloads import Path
from deployments.sd3.precision import PrecisionChoice


class Rehearsed:
    """Wraps a model; computes the same.

    Args:
        model: That computes.
        slowdown: How many times as long a forward shall take now; at most 1 changes nothing.
    """

    def __init__(self, model: VelocityModel, slowdown: Callable[[], float]) -> None:
        self._model = model
        self._slowdown = slowdown
        self.device: torch.device = model.device
        self.precision: PrecisionChoice = model.precision
        self.in_channels: int = model.in_channels

    def velocity(
        self, latents: Tensor, sigmas: Tensor, prompt_embeds: Tensor, pooled: Tensor
    ) -> Tensor:
        """Predict as the model does, and take longer."""
        slowdown = self._slowdown()
        if slowdown <= 1:
            return self._model.velocity(latents, sigmas, prompt_embeds, pooled)
        began = time.monotonic()
        predicted = self._model.velocity(latents, sigmas, prompt_embeds, pooled)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        time.sleep((time.monotonic() - began) * (slowdown - 1))
        return predicted

    def path(self, height: int, width: int, text_tokens: int, rows: int) -> Path:
        """Return how the model runs such a forward."""
        return self._model.path(height, width, text_tokens, rows)
