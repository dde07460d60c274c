"""Shares of right pictures with their uncertainty, alone and paired over the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z_95 = 1.959964  # two-sided
_Z_95_ONE_SIDED = 1.644854


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927).

    Args:
        right: successes.
        n: trials; with none, nothing is known and the interval is all of [0, 1].

    Raises:
        ValueError: fewer than no successes, or more than trials.
    """
    if not 0 <= right <= n:
        raise ValueError(f"{right} of {n} is no share")
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the sums are exact but for rounding.
    return (0.0 if right == 0 else middle - reach), (1.0 if right == n else middle + reach)


def paired_loss(reference: Sequence[bool], other: Sequence[bool]) -> dict[str, float]:
    """Loss of `other` against `reference` over the same prompts and seeds.

    The bound is Wald's over the discordant pairs with half a pair added to each cell (Agresti and
    Min, 2005), so that no discordant pair at all does not count as certainty.

    Returns:
        `loss`: share of prompts lost, net; `upper_95`: its one-sided 95 % bound; `lost` and
        `gained`: prompts right in one and wrong in the other.

    Raises:
        ValueError: no prompts, or another number of them.
    """
    pairs = list(zip(reference, other, strict=True))
    if not pairs:
        raise ValueError("a paired comparison needs prompts")
    lost = sum(before and not after for before, after in pairs)
    gained = sum(after and not before for before, after in pairs)
    n = len(pairs) + 2
    middle = (lost - gained) / n
    variance = (lost + gained + 1 - (lost - gained) ** 2 / n) / n**2
    return {
        "loss": (lost - gained) / len(pairs),
        "upper_95": middle + _Z_95_ONE_SIDED * math.sqrt(variance),
        "lost": lost,
        "gained": gained,
    }
