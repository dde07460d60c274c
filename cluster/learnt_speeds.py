"""How fast cards are beside one another, learnt from what each replica measures of one usual step.

Every replica tells the cool seconds of the same step: one guided step of the model's usual size. In
two places that says more than what was known before:

- Between kinds. A table's speeds are estimates; the ratio of two kinds' steps is a measurement. The
  anchor, whose speed is taken as it is, is a pool whose speed somebody set, or else the quickest of
  the table that has told: an H100, where there is one.
- Within a pool. All cards are of one kind. One that takes longer for a cool step than most of the
  others was warm or busy when it measured, and is that much slower than it says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.derating import Floats
from cluster.plan_pool import Pool

# What cards of one kind differ by anyway.
_ALIKE = 1.15
_MOST_BEHIND = 10.0
# Ratios beyond these are no kinds of cards but an error.
_LEAST_SPEED, _MOST_SPEED = 1e-6, 1e3


@dataclass(frozen=True, slots=True)
class KindSpeed:
    """What is known of a pool's kind of card.

    Attributes:
        speed: An H100 being 1, as set or from a table.
        is_estimate: It is from a table.
        step_s: Cool seconds of the usual step; None: no replica has told.
    """

    speed: float
    is_estimate: bool
    step_s: float | None = None


def learnt_speeds(kinds: Mapping[str, KindSpeed]) -> dict[str, float]:
    """Return each pool's speed: as measured where it was an estimate and its replicas have told.

    Args:
        kinds: By pool; of one stage and one model.
    """
    told = {name: kind for name, kind in kinds.items() if _is_time(kind.step_s)}
    speeds = {name: kind.speed for name, kind in kinds.items()}
    if not told:
        return speeds
    anchor = min(told.items(), key=lambda item: (item[1].is_estimate, -item[1].speed, item[0]))[1]
    for name, kind in told.items():
        if kind.is_estimate and kind is not anchor:
            speed = anchor.speed * (anchor.step_s or 0.0) / (kind.step_s or 1.0)
            speeds[name] = min(max(speed, _LEAST_SPEED), _MOST_SPEED)
    return speeds


def told_steps(pools: Sequence[Pool]) -> dict[str, float]:
    """Return what the usual step takes on each pool of which a replica told it."""
    return {pool.name: pool.usual_step_s for pool in pools if pool.usual_step_s is not None}


def with_learnt_speeds(pools: Sequence[Pool], step_s: Mapping[str, float]) -> tuple[Pool, ...]:
    """Return pools with the speeds of their kinds as far as those are known by now.

    Args:
        pools: Of all stages and models.
        step_s: What the usual step takes on each, as last told.
    """
    speeds: dict[str, float] = {}
    for group in {pool.group for pool in pools}:
        kinds = {
            pool.name: KindSpeed(pool.kind_speed, pool.is_estimate, step_s.get(pool.name))
            for pool in pools
            if pool.group == group
        }
        speeds |= learnt_speeds(kinds)
    return tuple(
        replace(pool, kind_speed=speeds[pool.name])
        if speeds[pool.name] != pool.kind_speed
        else pool
        for pool in pools
    )


def usual_step_s(steps_s: Sequence[float] | Floats) -> float | None:
    """Return what the usual step takes on a pool's cool cards; None: nobody told.

    The lower quartile: who measured on a warm card erred upwards.

    Args:
        steps_s: Of its replicas; what is no time is passed over.
    """
    told = np.asarray(steps_s, dtype=np.float64)
    told = told[np.isfinite(told) & (told > 0)]
    if not len(told):
        return None
    place = (len(told) - 1) // 4
    return float(np.partition(told, place)[place])


def behind_peers(steps_s: Floats, usual_s: float) -> Floats:
    """Return how many times as long as its peers' each cool step takes; 1 if about as long.

    Args:
        steps_s: Of replicas; what is no time counts as like its peers'.
        usual_s: `usual_step_s` of their pool.
    """
    ratios = np.nan_to_num(steps_s / usual_s, nan=1.0, posinf=1.0, neginf=1.0)
    return np.where(ratios > _ALIKE, np.minimum(ratios, _MOST_BEHIND), 1.0)


def _is_time(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
