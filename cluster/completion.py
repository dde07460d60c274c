"""When a request would be done, given the work that stages have to do before it.

Work flows: what is ahead of a request in a stage is done by all of the stage's cards together, each
kind at its own speed, and the request's own picture by one card. A request goes where it is done
first, and so did all before it. Then all pools of a stage are level: a request that comes behind
so much work is done at the time t at which

    sum over pools of  capacity * max(0, t - own time there)  =  work ahead.

Stages work side by side, so the longest wait of a stage is waited and not their sum (the bottleneck
of a flow shop; Johnson, Naval Research Logistics Quarterly 1, 1954); own times add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolOutlook:
    """What a stage's pool does for a request.

    Attributes:
        own_s: Seconds until one piece of it would be done there with nothing ahead; the start of
            a first replica included.
        capacity: Seconds of work that the pool does a second, in the unit of `StageOutlook`.
    """

    own_s: float
    capacity: float


@dataclass(frozen=True, slots=True)
class StageOutlook:
    """A stage as a request meets it.

    Attributes:
        pools: At least one.
        piece_s: Work of one of its pieces, in a unit that all pools share.
        pieces: Of the request, one a picture or one in all.
        ahead_s: Work that was there before, in the same unit.
    """

    pools: tuple[PoolOutlook, ...]
    piece_s: float
    pieces: int
    ahead_s: float


@dataclass(frozen=True, slots=True)
class Completion:
    """When a request would be done; in seconds from now, as far as stages tell.

    Attributes:
        least_s: With nothing ahead, and cards that do all its pictures in common forwards.
        alone_s: With nothing ahead.
        behind_s: Longer because of what is ahead.
        own_s: By how much whoever comes after it is done later.
    """

    least_s: float
    alone_s: float
    behind_s: float
    own_s: float


# The most that common forwards gain over single ones: Medium at 512 x 512 (DESIGN.md).
_MOST_GAIN = 3.0


def completion(stages: Sequence[StageOutlook]) -> Completion:
    """Return when a request would be done, from all stages that it passes."""
    least = alone = behind = own = 0.0
    for stage in stages:
        others = max(stage.pieces - 1, 0) * stage.piece_s
        by_itself = done_at(stage.pools, others)
        waits = done_at(stage.pools, others + stage.ahead_s) - by_itself
        least += done_at(stage.pools, others / _MOST_GAIN)
        alone += by_itself
        behind = max(behind, waits)
        capacity = sum(pool.capacity for pool in stage.pools)
        own = max(own, stage.pieces * stage.piece_s / capacity if capacity > 0 else 0.0)
    return Completion(least, alone, behind, own)


def done_at(pools: Sequence[PoolOutlook], ahead_s: float) -> float:
    """Return when one piece would be done behind so much work.

    Args:
        pools: Where it can be done; those without capacity do nothing.
        ahead_s: Work before it.

    Returns:
        Seconds; infinite where no pool has capacity.
    """
    able = sorted((pool for pool in pools if pool.capacity > 0), key=lambda pool: pool.own_s)
    if not able:
        return math.inf
    left, rate, at = max(ahead_s, 0.0), 0.0, able[0].own_s
    for pool, following in zip(able, [*able[1:], None], strict=True):
        rate += pool.capacity
        until = math.inf if following is None else following.own_s
        if left <= rate * (until - at):
            break
        left -= rate * (until - at)
        at = until
    return at + left / rate
