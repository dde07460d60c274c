"""Forwards captured once and replayed: one launch instead of a thousand.

Buys nothing where the GPU is busy, and most where it would wait for Python: Medium at 512x512 with
two rows takes 9 ms instead of 54 on an H100. All graphs share one memory pool, since no two replay
at a time; a shape that was not captured runs kernel by kernel, slower, and nothing is compiled for
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_WARM_UPS = 2


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class CudaGraphs:
    """Graphs of one model's forward, by shape.

    Args:
        forward: Latents, timesteps, prompt embeddings and pooled embeddings to velocities.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._pool: Any = None

    def has(self, latents: Sequence[int], text_tokens: int) -> bool:
        """True if a shape was captured.

        Args:
            latents: Shape [B, C, h, w].
            text_tokens: T.
        """
        return (*latents, text_tokens) in self._captured

    @torch.inference_mode()
    def capture(
        self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, pooled: Tensor
    ) -> None:
        """Capture the forward of these inputs' shapes; nothing if that was done before."""
        if self.has(latents.shape, prompt_embeds.shape[1]):
            return
        inputs = (latents, timesteps, prompt_embeds, pooled)
        # Kernels compile and libraries allocate on first use, which a capture cannot contain.
        side: Any = torch.cuda.Stream(latents.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forward(*inputs)
        torch.cuda.current_stream(latents.device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self._forward(*inputs)
        self._captured[*latents.shape, prompt_embeds.shape[1]] = _Captured(graph, inputs, output)

    def replay(
        self, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, pooled: Tensor
    ) -> Tensor:
        """Return the result in float32: a copy, for the next replay overwrites the graph's own."""
        captured = self._captured[*latents.shape, prompt_embeds.shape[1]]
        given = (latents, timesteps, prompt_embeds, pooled)
        for own, value in zip(captured.inputs, given, strict=True):
            own.copy_(value)
        captured.graph.replay()
        return captured.output.to(torch.float32, copy=True)
