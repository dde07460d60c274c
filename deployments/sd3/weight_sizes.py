"""How much memory a component's weights would take, read from its files' headers alone."""

from __future__ import annotations

from math import prod
from pathlib import Path

from serve.checkpoints.reference import part_in

_BF16_BYTES = 2


def bf16_bytes(folder: Path) -> int:
    """Return the bytes of a component's weights if all were bfloat16.

    Args:
        folder: Such as `MODEL/transformer`.

    Raises:
        ConfigurationError: No safetensors files, or damaged ones.
    """
    return _BF16_BYTES * sum(prod(source.shape) for source in part_in(folder).weights.values())
