"""Why the plan decided so, in words for a person at three in the morning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cluster.plan_pool import Pool
from cluster.plan_settings import PlanSettings
from cluster.sizing import Capacity, Need

# Less is lost by every warm card; saying so each time would hide what matters.
_WORTH_TELLING = 0.95
_MOST_TOLD = 20

Derated = tuple[tuple[str, float, str], ...]


def derated(pool: Pool, settings: PlanSettings) -> Derated:
    """Return replicas that do not count in full, the worst first: id, factor, why.

    At most twenty, so that a hot hall of a thousand cards does not fill the log.
    """
    places = np.flatnonzero(pool.factor < _WORTH_TELLING)
    if not len(places):
        return ()
    worst = places[np.argsort(pool.factor[places], kind="stable")][:_MOST_TOLD]
    return tuple(
        (pool.ids[at], float(pool.factor[at]), _why(pool, int(at), settings)) for at in worst
    )


def derated_count(pool: Pool) -> int:
    """Return how many replicas do not count in full."""
    return int((pool.factor < _WORTH_TELLING).sum())


def _why(pool: Pool, at: int, settings: PlanSettings) -> str:
    causes = []
    if pool.throttled[at]:
        causes.append("throttled")
    if pool.margin_c[at] < settings.cool_margin_c:
        causes.append(f"{pool.margin_c[at]:.0f} C margin")
    if pool.measured[at] < _WORTH_TELLING:
        causes.append(f"{100 * pool.measured[at]:.0f} % of its cool speed")
    return ", ".join(causes)


def heat_words(pool: Pool, told: Derated) -> str:
    """Return how many cards are derated and the worst of them; empty if none is."""
    if not told:
        return ""
    count = derated_count(pool)
    _, factor, why = told[0]
    which = "derated" if count == 1 else "derated, the worst"
    mark = " (scripted readings: a rehearsal)" if pool.scripted.any() else ""
    return f"{count} of {pool.present} cards {which} to {factor:.2g} at {why}{mark}"


def start_words(pool: Pool) -> str:
    """Return which starts are not counted on any more; empty if all are."""
    if not pool.late:
        return ""
    return (
        f"{pool.late} that should have started are not counted on: asked for {pool.late_s:.0f} s "
        f"ago, a start takes {pool.start_s:.0f}"
    )


def growth_words(needs: Need, has: Capacity, level: float, ahead: float, expected: float) -> str:
    """Return why a group needs more."""
    causes = []
    if needs.backlog > 0:
        causes.append(f"{waiting_words(needs)}, target {needs.target_s:.0f}")
    if expected > level + ahead:
        causes.append(f"the denoisers will send {figure(expected)} cool s/s of work")
    elif needs.demand > (has.now + has.coming) or not causes:
        causes.append(f"{figure(level)} cool s/s of work arrive")
        if ahead > 0.05 * level:
            causes.append(f"rising by {figure(ahead)} until a replica has started")
    can = f"{figure(has.now)} can be done"
    if has.coming > 0:
        can += f" and {figure(has.coming)} are starting"
    causes.append(f"{can}, {figure(needs.total)} needed")
    if has.cool >= needs.total:
        causes.append("cool cards would do; new replicas take their share of the work")
    return ", ".join(causes)


def rest_words(needs: Need, has: Capacity, level: float) -> str:
    """Return how a group stands that needs nothing."""
    load = (
        f"{100 * level / has.now:.0f} % of {figure(has.now)} cool s/s" if has.now > 0 else "nothing"
    )
    words = waiting_words(needs)
    if needs.waiting_s > needs.target_s:
        words += ", which will be gone before a new replica could begin"
    words += f", work takes {load}"
    return words + (f", {figure(has.coming)} starting" if has.coming > 0 else "")


def waiting_words(needs: Need) -> str:
    """Return how much waits."""
    if math.isinf(needs.waiting_s):
        return "work waiting and no replica"
    return f"{figure(needs.waiting_s)} s of work waiting"


def figure(value: float) -> str:
    """Return a number as people say it: 41, 2.7, 0.04."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def sentence(pool: Pool, after: int, parts: Sequence[str]) -> str:
    """Return the whole reason: what changes, and why."""
    what = f"{pool.target} -> {after}" if after != pool.target else f"stays at {after}"
    return f"{pool.name} {what}: " + "; ".join(part for part in parts if part)
