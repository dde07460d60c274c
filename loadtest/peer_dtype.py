"""What peers compute in on a CPU: the faster of bfloat16 and float32 there, diffusers' own default.

Without AMX float32 is the faster one on Intel's CPUs; whoever serves from one would find out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

_REPEATS = 25
_SHAPE = (666, 256, 1024)  # a picture's rows, with guidance, and the built-in model's widest layer


def product_ms() -> dict[torch.dtype, float]:
    """Return the median milliseconds of one layer's product in each dtype; they take turns."""
    rows, inputs, outputs = _SHAPE
    calls = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        calls[dtype] = (x.to(dtype), weight.to(dtype).t())
    took: dict[torch.dtype, list[float]] = {dtype: [] for dtype in calls}
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as peers have
    try:
        for _ in range(_REPEATS):
            for dtype, (x, weight) in calls.items():
                began = time.perf_counter()
                torch.mm(x, weight)
                took[dtype].append(1000 * (time.perf_counter() - began))
    finally:
        torch.set_num_threads(threads)
    return {dtype: statistics.median(each) for dtype, each in took.items()}


def faster_of(took: Mapping[torch.dtype, float]) -> torch.dtype:
    """Return the dtype whose product took least."""
    return min(took, key=took.__getitem__)


def stored_dtype(model: Path) -> torch.dtype:
    """Return what the transformer of a plain folder is stored in."""
    file = next(iter(sorted((model / "transformer").glob("*.safetensors"))))
    with safe_open(file, "pt") as stored:
        tensor: torch.Tensor = stored.get_tensor(next(iter(stored.keys())))
        return tensor.dtype
