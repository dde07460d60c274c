"""Attention over the joint sequence: several ways to compute it, the fastest for a shape measured.

Buys: a step of Large at 1024x1024 on an H100 takes 84 ms with flash-attn-4, if that is installed,
92 with cuDNN's attention and 105 with torch's own flash kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from serve.errors import ConfigurationError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_RUNS_A_GRAPH = 4
_TIMED_REPLAYS = 5
_PREFERRED = ("flash4", "cudnn", "flash")
_WORTH_IT = 1.03  # how much slower than the fastest what is preferred may be
_log = logging.getLogger(__name__)


def _sdpa(*backends: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if backends:
            with sdpa_kernel(list(backends)):
                attended = scaled_dot_product_attention(query, key, value)
        else:
            attended = scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).flatten(2)

    return attend


def _in_float32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    attended = BACKENDS["sdpa"](query.float(), key.float(), value.float())
    return attended.to(query.dtype)


def _flash_attn_4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    attended = flash_attn_func(query, key, value)
    attended = attended[0] if isinstance(attended, tuple) else attended
    result: Tensor = attended.flatten(2)
    return result


BACKENDS: dict[str, Attend] = {
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "flash4": _flash_attn_4,
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "math": _sdpa(SDPBackend.MATH),
    "sdpa": _sdpa(),
    "sdpa_in_float32": _in_float32,
}


class Attention:
    """One model's attention.

    Args:
        wanted: `auto` or a name in BACKENDS.
        device: Where the model is.
        dtype: It computes in.

    Raises:
        ConfigurationError: Unknown name.
    """

    def __init__(self, wanted: str, device: torch.device, dtype: torch.dtype) -> None:
        if wanted != "auto" and wanted not in BACKENDS:
            raise ConfigurationError(
                f"Unknown attention {wanted!r}.",
                field="attention",
                value=wanted,
                allowed="one of: auto, " + ", ".join(BACKENDS),
            )
        self._wanted = wanted
        self._device = device
        self._dtype = dtype
        self._measured: dict[tuple[int, ...], str] = {}
        # cuDNN makes a plan for every new shape: that would be compiling for a request.
        self._unmeasured = "flash" if dtype == torch.bfloat16 else "sdpa"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend without a mask.

        Args:
            query: [B, query tokens, heads, width].
            key: [B, tokens, heads, width].
            value: The same shape.

        Returns:
            [B, query tokens, heads * width].
        """
        return BACKENDS[self.backend(query.shape[0], key.shape[1])](query, key, value)

    def backend(self, batch: int, tokens: int) -> str:
        """Return the name of what is used for a shape; measures nothing."""
        if self._wanted != "auto":
            return self._wanted
        if self._device.type == "cpu":
            return _on_cpu(self._dtype)
        return self._measured.get((batch, tokens), self._unmeasured)

    def measure(self, batch: int, tokens: int, heads: int, width: int) -> None:
        """Time what there is on random data of a shape and keep the fastest; CUDA only."""
        if self._wanted != "auto" or self._device.type != "cuda":
            return
        seconds = {}
        shape = (3, batch, tokens, heads, width)
        inputs = torch.randn(shape, device=self._device, dtype=self._dtype).unbind()
        for name in _candidates():
            try:
                seconds[name] = _median_ms(BACKENDS[name], inputs)
            except Exception as error:  # whatever a library raises, the others remain
                _log.info("attention %s cannot do %s: %s", name, shape, error)
        if seconds:
            # Equal replicas should compute alike: noise must not choose between equals.
            good = min(seconds.values()) * _WORTH_IT
            self._measured[batch, tokens] = next(
                name for name in _PREFERRED if seconds.get(name, math.inf) <= good
            )
        if "flash4" in seconds:
            self._unmeasured = "flash4"  # compiled by now, for every shape


def _on_cpu(dtype: torch.dtype) -> str:
    """Return what is fastest on this CPU: bfloat16 is there where AMX multiplies it.

    Without, on one thread of a Xeon with AVX-512, two rows of 336 tokens and 4 heads take 2.2 ms in
    float32, casts included, and 3.4 in bfloat16; of 4173 tokens 302 and 483.
    """
    if dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():
        return "sdpa_in_float32"
    return "sdpa"


def _candidates() -> list[str]:
    try:
        has_flash4 = find_spec("flash_attn.cute") is not None
    except ImportError as error:  # none at all, or one built for another torch
        _log.info("no flash-attn-4: %s", error)
        has_flash4 = False
    return [name for name in _PREFERRED if name != "flash4" or has_flash4]


def _median_ms(attend: Attend, inputs: tuple[Tensor, ...]) -> float:
    """Time inside a captured graph, as it will run; some ways take Python longer to launch."""
    attend(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_RUNS_A_GRAPH):
            attend(*inputs)
    times: list[float] = []
    for _ in range(_TIMED_REPLAYS):
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]
