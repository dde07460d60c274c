"""A model whose forwards take longer than they must: the rehearsal of a throttled card.

Only a scripted source of heat asks for it (`cluster.scripted_heat`). The time is slept away, so
that several rehearsed cards share the cores of one machine without slowing one another down. A
rehearsed forward takes its own processor time, rounded up to hundredths of a second, times what the
script says: the rounding keeps a busy machine's noise out of what shall be the card's. What the
script says while a replica starts belongs to its cool baseline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deployments.payloads import Path
from deployments.sd3.lora_layers import PageUse
from deployments.sd3.precision import PrecisionChoice
from deployments.warm_up import WarmableModel

_FIRST_LOOKS = 8
_ROUNDED_S = 0.01


class Rehearsed:
    """Wraps a model; computes the same.

    Args:
        model: That computes.
        slowdown: How many times as long a forward shall take now.
    """

    def __init__(self, model: WarmableModel, slowdown: Callable[[], float]) -> None:
        self._model = model
        self._slowdown = slowdown
        self._least_s: dict[tuple[int, ...], float] = {}
        self.device: torch.device = model.device
        self.precision: PrecisionChoice = model.precision
        self.in_channels: int = model.in_channels
        self.joint_attention_dim: int = model.joint_attention_dim
        self.pooled_projection_dim: int = model.pooled_projection_dim
        self.largest_side: int = model.largest_side

    def velocity(
        self,
        latents: Tensor,
        sigmas: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        loras: Sequence[Sequence[PageUse]] = (),
    ) -> Tensor:
        """Predict as the model does, and take longer."""
        inputs = (latents, sigmas, prompt_embeds, pooled, loras)
        kind = (*latents.shape, prompt_embeds.shape[1])
        if kind not in self._least_s:
            self._least_s[kind] = min(self._timed(*inputs)[1] for _ in range(_FIRST_LOOKS))
        began = time.monotonic()
        predicted, seconds = self._timed(*inputs)
        least_s = self._least_s[kind] = min(seconds, self._least_s[kind])
        whole_s = math.ceil(least_s / _ROUNDED_S) * _ROUNDED_S * self._slowdown()
        time.sleep(max(began + whole_s - time.monotonic(), 0.0))
        return predicted

    def _timed(self, *inputs: Any) -> tuple[Tensor, float]:
        # On a card the time is the card's, and this thread spends it waiting.
        clock = time.monotonic if self.device.type == "cuda" else time.thread_time
        began = clock()
        predicted = self._model.velocity(*inputs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return predicted, clock() - began

    def path(
        self, height: int, width: int, text_tokens: int, rows: int, adapted: bool = False
    ) -> Path:
        """Return how the model runs such a forward."""
        return self._model.path(height, width, text_tokens, rows, adapted)

    def prepare(self, height: int, width: int, text_tokens: int, rows: int) -> None:
        """Make the model's forwards of one shape as fast as they get."""
        self._model.prepare(height, width, text_tokens, rows)
