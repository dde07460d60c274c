"""Heat as lost capacity: how much of a card may be counted on, from its margin and its reasons.

A card far under its limit counts in full. As the margin closes it counts less, along a smooth step,
because it is about to slow down and because work moved to it would make it slow down: at 4 C under
the limit the defaults give 0.6. What a card was measured to do by now (`ReplicaState.speed`) and
what its margin foretells are two views of one loss, so the smaller counts, never their product.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cluster.plan_settings import PlanSettings
from cluster.pool_state import ReplicaState

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def closing(margin_c: Floats, cool_c: float, hot_c: float = 0.0) -> Floats:
    """0 where the margin is `cool_c` or more, 1 at `hot_c` or less, a smooth step between.

    A margin that is not known (NaN) counts as cool.
    """
    left = np.clip((margin_c - hot_c) / max(cool_c - hot_c, 1e-6), 0.0, 1.0)
    return np.where(np.isnan(left), 0.0, 1.0 - left * left * (3.0 - 2.0 * left))


def factors(margin_c: Floats, throttled: Flags, settings: PlanSettings) -> Floats:
    """`derating` of many cards at once, of fresh readings alone; NaN is a margin not known."""
    factor = 1.0 - (1.0 - settings.least_factor) * closing(margin_c, settings.cool_margin_c)
    return np.where(throttled, np.minimum(factor, settings.throttled_factor), factor)


def is_fresh(age_s: float | None, settings: PlanSettings) -> bool:
    """Whether something of that age still says anything."""
    return age_s is not None and math.isfinite(age_s) and age_s <= settings.stale_after_s


def derating(replica: ReplicaState, settings: PlanSettings) -> float:
    """How much of the card counts, 0 to 1: never less for a larger margin, all other things equal.

    1 where heat is switched off or where nothing fresh is known of it.
    """
    known = is_fresh(replica.reading_age_s, settings) and is_fresh(replica.age_s, settings)
    if not (settings.heat and known):
        return 1.0
    margin = np.array([math.nan if replica.margin_c is None else replica.margin_c])
    return float(factors(margin, np.array([bool(replica.throttled)]), settings)[0])
