"""The matrices of a LoRA file, read into memory of their own and checked number by number.

Not mapped: a file that somebody cuts short while it is read must end a request, not the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BufferedReader

import torch
from torch import Tensor

from deployments.sd3.lora_arena import LowRank
from serve.checkpoints.lora_file import LoraFile, LoraLayer, refusal

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_layers(file: LoraFile, layers: Iterable[LoraLayer]) -> dict[str, LowRank]:
    """Read some of a file's layers; their scales are within `up`.

    Args:
        file: As it was checked.
        layers: Of one part of the model.

    Returns:
        By the names of the modules; float32.

    Raises:
        InvalidRequest: It has changed since it was checked, or holds NaN or infinite values.
    """
    read: dict[str, Tensor] = {}
    found: dict[str, LowRank] = {}
    try:
        with file.path.open("rb") as stream:
            for layer in layers:
                for name in (layer.down, layer.up):
                    if name not in read:
                        read[name] = _tensor(file, stream, name)
                found[layer.module] = _low_rank(layer, read[layer.down], read[layer.up])
    except OSError as error:
        raise refusal(file.name, f"it cannot be read: {error.strerror or error}") from None
    return found


def _tensor(file: LoraFile, stream: BufferedReader, name: str) -> Tensor:
    stored = file.header.tensors[name]
    data = bytearray(stored.end - stored.begin)
    stream.seek(stored.begin)
    if stream.readinto(data) < len(data):
        raise refusal(file.name, f"tensor {name!r} is cut short; the file was changed")
    value = torch.frombuffer(data, dtype=_DTYPES[stored.dtype]).float()
    if not torch.isfinite(value).all():
        raise refusal(file.name, f"tensor {name!r} holds NaN or infinite values")
    return value.view(stored.shape[:2])


def _low_rank(layer: LoraLayer, down: Tensor, up: Tensor) -> LowRank:
    at, parts = layer.rows
    size = len(up) // parts
    rows = up[at * size : (at + 1) * size]
    if layer.swapped:
        rows = torch.cat(rows.chunk(2)[::-1])
    if parts > 1:
        # Of query, key and value trained apart and stored as one, each has its own ranks.
        own = rows.abs().amax(dim=0) > 0
        down, rows = down[own], rows[:, own]
    return LowRank(down, rows * layer.scale)
