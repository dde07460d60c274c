"""A table of position embeddings continued beyond its edge.

SD3's table is sines and cosines of a patch's place (diffusers, `get_2d_sincos_pos_embed`), of which
a picture takes the middle. Nothing was learnt in it, so it goes on by the same formula, and whoever
asks for larger pictures than a model was trained at gets what the model makes of places it has not
seen. The middle stays as it is: pictures that the table was made for do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from serve.errors import ConfigurationError

# What float16 and bfloat16 make of values up to 1.
_ROUNDING = 2**-7


def continued_positions(table: Tensor, side: int, spacing: float) -> Tensor:
    """Return a larger table with the given one in its middle.

    Args:
        table: [1, n * n, width], of sines and cosines.
        side: Patches a side of the new one; n and an even number more.
        spacing: Of neighbouring patches: the model's own patches a side by n.

    Returns:
        [1, side * side, width], of the table's dtype and device.

    Raises:
        ConfigurationError: The table is no such one, or the sizes do not fit.
    """
    _, tokens, width = table.shape
    old = round(tokens**0.5)
    margin = (side - old) // 2
    if margin < 0 or (side - old) % 2 or width % 4:
        raise _unfit(f"a table of {old} x {old} positions in one of {side} x {side}")
    places = (torch.arange(side, dtype=torch.float64) - margin) * spacing
    quarter = width // 4
    rates = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = places[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    columns = waves[None].expand(side, side, -1)
    rows = waves[:, None].expand(side, side, -1)
    made = torch.cat([columns, rows], 2).to(table.device, table.dtype)
    middle = made[margin : margin + old, margin : margin + old]
    kept = table.view(old, old, width)
    if not torch.allclose(middle.float(), kept.float(), rtol=0.0, atol=_ROUNDING):
        raise _unfit("a table of positions that is no sines and cosines of places")
    middle.copy_(kept)
    return made.view(1, side * side, width)


def _unfit(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"The transformer cannot draw larger pictures than its table is for: {what}.",
        field="largest_side",
        allowed="kelvin.json without largest_side",
    )
