"""What one thing costs over another, from pairs measured in turn, and how sure that is.

The unit of the interval is not the pair: what disturbs a machine lasts for seconds and so for
several pairs, which then are fewer observations than they look. Consecutive pairs are put together
in groups and the groups are taken for independent (batch means; Law, Simulation Modeling and
Analysis, 9.5.3); their mean has Student's interval.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t

GROUPS = 20  # at most: more would be of too few pairs each, fewer cost the interval's width
LEAST_GROUPS = 2
Verdict = Literal["met", "missed", "undecided"]
Pair = tuple[float, float]  # without and with


@dataclass(frozen=True)
class Cost:
    """A cost with its 95 % interval.

    Attributes:
        mean: Of the groups.
        low: Of the interval.
        high: Of it.
        groups: That it was taken from.
    """

    mean: float
    low: float
    high: float
    groups: int

    def verdict(self, at_most: float) -> Verdict:
        """Return whether the whole interval is on one side of a target."""
        return "met" if self.high <= at_most else "missed" if self.low > at_most else "undecided"


def cost(pairs: Sequence[Pair], of_group: Callable[[Sequence[Pair]], float]) -> Cost:
    """Return what the second of each pair costs over the first.

    Args:
        pairs: In the order in which they were measured.
        of_group: The cost in one group: `median_added` or `lost_share`.

    Raises:
        ValueError: There are fewer than two pairs, of which nothing can be said.
    """
    if len(pairs) < LEAST_GROUPS:
        raise ValueError(f"{len(pairs)} pairs have no interval")
    number = min(GROUPS, len(pairs))
    # Sizes differ by one at most, and every pair is in one group.
    edges = [len(pairs) * edge // number for edge in range(number + 1)]
    found = [of_group(pairs[begin:end]) for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    mean = statistics.fmean(found)
    reach = float(t.ppf(0.975, number - 1)) * statistics.stdev(found) / math.sqrt(number)
    return Cost(mean, mean - reach, mean + reach, number)


def median_added(pairs: Sequence[Pair]) -> float:
    """Return by how much the second of a pair is more, in the median."""
    return statistics.median(second - first for first, second in pairs)


def mean_added(pairs: Sequence[Pair]) -> float:
    """Return by how much the seconds of pairs are more, in the mean."""
    return statistics.fmean(second - first for first, second in pairs)


def lost_share(pairs: Sequence[Pair]) -> float:
    """Return the share of throughput lost, where pairs are seconds of the same work."""
    return 1 - sum(first for first, _ in pairs) / sum(second for _, second in pairs)
