"""How much memory a component's weights would take, read from its files' headers alone."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open

from deployments.sd3.stored_tensors import StoredTensors

_BF16_BYTES = 2
_SCALE = "_scale"  # `X.weight_scale` beside an FP8 `X.weight` is no weight of the model's own


def bf16_bytes(folder: Path) -> int:
    """Return the bytes of a component's weights if all were bfloat16.

    Args:
        folder: Such as `MODEL/transformer`.

    Raises:
        ConfigurationError: No safetensors files, or damaged ones.
    """
    with StoredTensors(folder) as stored:  # refuses what is damaged, in words
        names = stored.names()
        files = {stored.file_of(name) for name in names}
    weights = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                if not (name.endswith(_SCALE) and name.removesuffix(_SCALE) in names):
                    weights += math.prod(tensors.get_slice(name).get_shape())
    return weights * _BF16_BYTES
