"""How much work comes: rates and their trend, from counters that replicas report now and then.

Work is counted here in reference seconds: cool seconds of a pool times its kind's speed, which is
what the work would take on a cool H100, so that pools of one group can be added up.

Two exponential averages are kept, a quick one that sees a burst within seconds and a slow one that
sees through noise. A report tells of all that came since the one before, `gap` seconds earlier; it
adds exactly what the average would have become had that work come evenly over the gap:
work x (1 - exp(-gap / tau)) / gap. So it does not matter how often replicas report, nor how often
the plan is made. What waits outside of replicas has arrived too: its growth counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.derating import Floats
from cluster.plan_pool import Pool
from cluster.plan_settings import PlanSettings

# The first report of a new replica tells of what came over about so long.
_REPORT_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Averages:
    """What is remembered of a group's demand; rates in reference seconds a second.

    Attributes:
        since: When watching began.
        at: When this was brought up to date.
        quick: Average over `fast_s`, not yet scaled up for youth.
        slow: Average over `slow_s`, likewise.
    """

    since: float
    at: float
    quick: float = 0.0
    slow: float = 0.0


class Counter(NamedTuple):
    """What a replica had accepted by its newest report."""

    accepted_s: float
    reported_at: float
    seen_at: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What comes, in reference seconds a second.

    Attributes:
        level: That surely comes now.
        ahead: That will come on top by the time a replica asked for now has started.
        before: The level as it was at the tick before; what depends on it but must not depend on
            this tick's queue takes this.
    """

    level: float
    ahead: float
    before: float


def watch(
    pools: Sequence[Pool],
    averages: Averages | None,
    counters: Mapping[str, Counter],
    queued: Mapping[str, float],
    now: float,
    settings: PlanSettings,
) -> tuple[Demand, Averages, dict[str, Counter]]:
    """Bring a group's averages up to date.

    Args:
        pools: Of the group.
        averages: As remembered; None at first.
        counters: Of all replicas as remembered, by id.
        queued: Requests that waited outside of each pool's replicas at the tick before.
        now: Seconds.
        settings: Of the plan.

    Returns:
        Demand, averages and counters of these pools' replicas to be remembered.
    """
    first = averages is None
    if averages is None:
        averages = Averages(now, now)
    elapsed = max(now - averages.at, 0.0)
    came: list[tuple[Floats, Floats]] = []
    told: dict[str, Counter] = {}
    for pool in pools:
        work, gap, updated = _accepted(pool, counters, elapsed, now, first)
        told.update(updated)
        came.append((work * pool.kind_speed, gap))
        if elapsed > 0 and pool.name in queued:
            grown = (pool.queued - queued[pool.name]) * pool.request_s * pool.kind_speed
            came.append((np.array([grown]), np.array([elapsed])))
    before = averages
    after = Averages(
        before.since,
        max(now, before.at),
        _fed(before.quick, elapsed, came, settings.fast_s),
        _fed(before.slow, elapsed, came, settings.slow_s),
    )
    # By the slow average of the tick before: whatever raises this tick's demand never lowers it by
    # way of its own noise.
    usual = _scaled(before.slow, before, settings.slow_s)
    size = max((pool.request_s * pool.kind_speed for pool in pools), default=0.0)
    noise = settings.noise * math.sqrt(usual * size / (2 * max(settings.fast_s, 1e-3)))
    quick = _scaled(after.quick, after, settings.fast_s)
    slow = _scaled(after.slow, after, settings.slow_s)
    level = max(slow, quick - noise, 0.0)
    rise = max(quick - slow - noise, 0.0) / max(settings.slow_s - settings.fast_s, 1.0)
    start_s = min((pool.start_s for pool in pools), default=0.0)
    # A ramp is behind in the quick average by its time constant. While both are young, what sets
    # them apart is their youth.
    grown_up = after.at - after.since >= settings.slow_s
    ahead = settings.trend * rise * (start_s + settings.fast_s) if grown_up else 0.0
    demand = Demand(level, min(ahead, settings.most_ahead * level), usual)
    return demand, after, told


def has_accepted(pool: Pool, counters: Mapping[str, Counter]) -> bool:
    """Whether any of a pool's replicas accepted something since it was last seen."""
    for name, accepted_s in zip(pool.ids, pool.accepted_s.tolist(), strict=True):
        before = counters.get(name)
        if before is not None and accepted_s > before.accepted_s:
            return True
    return False


def _accepted(
    pool: Pool, counters: Mapping[str, Counter], elapsed: float, now: float, first: bool
) -> tuple[Floats, Floats, dict[str, Counter]]:
    """Return what each replica accepted since its report before, over how long, and its counter."""
    remembered = [counters.get(each) for each in pool.ids]
    reported_at = now - np.where(np.isfinite(pool.reported_age_s), pool.reported_age_s, 0.0)
    was_s = np.array([math.nan if each is None else each.accepted_s for each in remembered])
    was_at = np.array([math.nan if each is None else each.reported_at for each in remembered])
    grown = pool.accepted_s - was_s
    gap = reported_at - was_at
    unknown = np.isnan(was_s)
    # A counter that went back begins anew; what came cannot be much more than what is still held.
    anew = unknown | (grown < 0)
    lately = max(elapsed, _REPORT_EVERY_S)
    work = np.where(anew, np.minimum(pool.accepted_s, pool.held_s + lately), grown)
    if first:
        work = np.where(unknown, 0.0, work)
    # A replica that tells nothing for once reports zero: nothing came, and the counter goes on.
    silent = ~unknown & (pool.accepted_s == 0)
    work = np.where(silent, 0.0, work)
    gap = np.where(anew, lately, gap).clip(max(min(elapsed, _REPORT_EVERY_S), 1e-3))
    kept_s = np.where(silent, was_s, pool.accepted_s).tolist()
    # What grew without a newer time came by now all the same.
    kept_at = np.where(silent, was_at, np.fmax(was_at, reported_at)).tolist()
    updated = {
        name: Counter(accepted_s, at, now)
        for name, accepted_s, at in zip(pool.ids, kept_s, kept_at, strict=True)
    }
    return work, gap, updated


def _fed(
    average: float, elapsed: float, came: Sequence[tuple[Floats, Floats]], tau_s: float
) -> float:
    tau_s = max(tau_s, 1e-3)
    added = sum(float((work * -np.expm1(-gap / tau_s) / gap).sum()) for work, gap in came)
    return average * math.exp(-elapsed / tau_s) + added


def _scaled(average: float, averages: Averages, tau_s: float) -> float:
    """Return an average scaled up by what it lacks for being young.

    Not while it is younger than its time constant: one request in the first second is no rate.
    """
    age = averages.at - averages.since
    weight = -math.expm1(-age / max(tau_s, 1e-3)) if age >= tau_s > 0 else 1.0
    return max(average, 0.0) / weight
