"""How much a replica's heat, and the age of what it told, weigh when a place is chosen for work."""

from __future__ import annotations

import numpy as np

from cluster.derating import Flags, Floats, closing
from cluster.routing import RoutingSettings


def avoidance(margin_c: Floats, throttled: Flags, settings: RoutingSettings) -> Floats:
    """Return how much each card is avoided, 0 to 1; a margin of NaN is not known."""
    if not settings.heat:
        return np.zeros(len(margin_c))
    near = closing(margin_c, settings.near_limit_c, settings.at_limit_c)
    return np.where(throttled, 1.0, near)


def staleness(age_s: Floats, stale_after_s: float) -> Floats:
    """Return how little each replica's report still says: 0 all, 1 nothing."""
    after = max(stale_after_s, 1e-3)
    return np.clip((age_s - after) / after, 0.0, 1.0)


def doubt(backlog_s: Floats, stale: Floats) -> Floats:
    """Return by how much each backlog may be larger than was told, as far as that is out of date.

    Up to twice the mean of what is known: on average a replica that tells nothing is thought to be
    as busy as the others. That is drawn anew for each request and not taken as a fact, or else one
    that once fell silent would stay worse than the best of the others for ever, and idle.
    """
    known = 1.0 - stale
    total = float(known.sum())
    mean = float((backlog_s * known).sum()) / total if total > 0 else 0.0
    return 2.0 * mean * stale


def slowness(speed: Floats, avoided: Floats, settings: RoutingSettings) -> Floats:
    """Return seconds that a cool second counts on each replica."""
    return 1.0 / (speed * (1.0 - (1.0 - settings.hot_speed) * avoided))


def blur_widths(age_s: Floats, settings: RoutingSettings) -> Floats:
    """Return how many seconds others may have sent to each since it told of itself."""
    return settings.blur * np.clip(age_s, 0.0, settings.stale_after_s)
