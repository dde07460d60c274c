"""Decoding compiled for the sizes that are usual, before the first request.

`torch.compile` joins group norms, activations and copies between convolutions, which takes an H100
from 90 ms to 38 at 1024x1024 (`loadtest.decode_bench`). It takes half a minute a size, so it
happens at start-up; a size that was not prepared is decoded as ever, and nothing compiles while a
request waits. Every prepared size is compared with plain decoding and timed against it, and kept
only if it is right and quicker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

_TIMED = 3
_LONGEST_REASON = 300
# Of a picture from -1 to 1: rounding stays far below it, wrong code does not. That what is served
# is right to one of the 255 values of a pixel, tests say.
_WRONG = 0.05
# Each size is a compilation of its own of one function; torch's own limit is 8.
_MOST_SIZES = 64


@dataclass(frozen=True)
class Prepared:
    """What became of preparing one size."""

    is_compiled: bool
    reason: str
    plain_ms: float | None = None  # None: not measured
    compiled_ms: float | None = None
    seconds: float = 0.0  # that preparing took


class CompiledDecode:
    """One decoder, compiled for some shapes of latents.

    Args:
        decoder: [1, C, h, w] to [1, 3, 8 h, 8 w], from -1 to 1.
        backend: Of `torch.compile`: a name, or a function that compiles a graph.
    """

    def __init__(self, decoder: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
        self._decoder = decoder
        self._compiled: Callable[[Tensor], Tensor] = torch.compile(
            # A function of its own: what torch compiles for it, and forgets, is no other's.
            lambda latents: decoder(latents),
            backend=backend,
            dynamic=False,
            fullgraph=True,
        )
        self.prepared: dict[tuple[int, ...], Prepared] = {}

    def has(self, latents: Tensor) -> bool:
        """True if latents of this shape are decoded by what was compiled."""
        found = self.prepared.get(tuple(latents.shape))
        return found is not None and found.is_compiled

    @torch.inference_mode()
    def prepare(self, latents: Tensor, *, must_be_quicker: bool = True) -> Prepared:
        """Compile for the shape of these latents; it never raises.

        Args:
            latents: [1, C, h, w], as decoding will get them; any values that are no constant.
            must_be_quicker: Keep what was compiled only if it is.
        """
        began = time.perf_counter()
        try:
            found = self._prepared(latents, must_be_quicker)
        except Exception as error:
            # Of many classes: no compiler, no memory, an operation that it cannot. Without it
            # decoding is slower and nothing else.
            words = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
            _log.warning("decoding %s is not compiled: %s", list(latents.shape), words)
            found = Prepared(False, words)
        found = replace(found, seconds=time.perf_counter() - began)
        self.prepared[tuple(latents.shape)] = found
        return found

    def _prepared(self, latents: Tensor, must_be_quicker: bool) -> Prepared:
        latents = _of_inference(latents)
        with torch._dynamo.config.patch(recompile_limit=_MOST_SIZES):
            compiled = self._compiled(latents).float().clamp(-1, 1)
        plain = self._decoder(latents).float().clamp(-1, 1)
        difference = float((compiled - plain).abs().mean())
        if not difference <= _WRONG:  # also where it is NaN
            return Prepared(False, f"compiled, it differs by {difference:.4f} from -1 to 1")
        del compiled, plain
        plain_ms = _timed_ms(self._decoder, latents)
        compiled_ms = _timed_ms(self, latents)
        if must_be_quicker and compiled_ms >= plain_ms:
            return Prepared(False, "compiled, it is not quicker", plain_ms, compiled_ms)
        return Prepared(True, "compiled", plain_ms, compiled_ms)

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents of a prepared shape, under `torch.inference_mode`."""
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._compiled(_of_inference(latents))


def _of_inference(latents: Tensor) -> Tensor:
    """Return a tensor made under `torch.inference_mode`: what is compiled holds for such alone."""
    return latents if latents.is_inference() else latents.clone()


def _timed_ms(decode: Callable[[Tensor], Tensor], latents: Tensor) -> float:
    """Return the quickest of some decodings: a neighbour on the card only ever slows one down."""
    took = []
    for _ in range(_TIMED):
        _wait_for(latents.device)
        began = time.perf_counter()
        decode(latents)
        _wait_for(latents.device)
        took.append(1000 * (time.perf_counter() - began))
    return min(took)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
