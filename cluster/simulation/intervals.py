"""Means over seeds with intervals, and paired differences: few runs, so Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_LEVEL = 0.975  # both sides together leave out 5 %


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95 % interval; None where one value tells of no spread.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values, no mean")
    number = len(values)
    mean = math.fsum(values) / number
    if number == 1:
        return mean, None
    from scipy.stats import t

    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (number - 1))
    return mean, float(t.ppf(_LEVEL, number - 1)) * spread / math.sqrt(number)


def summary(values: Sequence[float], digits: int = 6) -> dict[str, Any]:
    """Return mean, interval and the values themselves, as JSON."""
    mean, half = mean_and_half(values)
    return {
        "mean": round(mean, digits),
        "half_of_95_percent_interval": None if half is None else round(half, digits),
        "by_seed": [round(value, digits) for value in values],
    }


def paired(ours: Sequence[float], theirs: Sequence[float], digits: int = 6) -> dict[str, Any]:
    """Return the mean difference ours - theirs, seed by seed, with its interval.

    Raises:
        ValueError: They are not as many.
    """
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    return summary(differences, digits)
