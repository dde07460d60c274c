"""The plan: from the state of all pools to a replica count for each, in one pure function.

Queue depth alone adds replicas while a hot card crawls; temperature alone lags load, and a new
replica cools no card. So heat counts as lost capacity: a group of pools (one stage of one model)
gets replicas until what they can do now, as hot as they are, bears the work that comes and clears
what waits too long. Stages are decided together: what denoisers will finish, decoders must be there
for, and a request in front of any stage wakes them all.

Out at once, in slowly: replicas go only after fewer would have done for `scale_in_after_s` without
a break, some at a time, and never while too few replicas report.

Reference seconds are what work takes on a cool H100. One tick never gives a group fewer replicas
for more queue or more heat. Between pools of several kinds heat in one may send its growth to the
others, which never get fewer for it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from cluster.demand import Demand, has_accepted, watch
from cluster.derating import derating
from cluster.plan_intake import Pool, intake
from cluster.plan_memory import GroupMemory, PlanMemory, merged_counters, with_span
from cluster.plan_settings import PlanSettings
from cluster.plan_words import (
    Derated,
    derated,
    growth_words,
    heat_words,
    rest_words,
    sentence,
)
from cluster.pool_state import PoolState
from cluster.sizing import Capacity, Need, capacity, grown, need, shrunk

__all__ = [
    "Plan",
    "PlanMemory",
    "PlanSettings",
    "PoolDecision",
    "derating",
    "plan",
]

_log = logging.getLogger(__name__)

# With more than this share of a group's reports out of date, nothing is taken away from it.
_BLIND_SHARE = 0.25
# Some replica stays until the model has been idle for long, however small demand has become.
_SOME = 1e-6
# Twice the target is no longer what chance makes of arrivals.
_FAR_TOO_LONG = 2.0


@dataclass(frozen=True, slots=True)
class PoolDecision:
    """What is to become of one pool.

    Attributes:
        pool: Its name.
        before: Replicas that were asked for.
        after: That are to be asked for.
        reason: In words.
        capacity: Reference seconds of work that the pool's replicas do a second now.
        demand: Reference seconds of work a second that come to the pools of its stage and model.
        waiting_s: Seconds until what waits at its stage and model has begun, at the present speed.
        derated: Replicas that do not count in full: id, factor, why; the worst twenty.
    """

    pool: str
    before: int
    after: int
    reason: str
    capacity: float
    demand: float
    waiting_s: float
    derated: Derated = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions of one tick, by name of pool, and what was wrong with what was told."""

    decisions: tuple[PoolDecision, ...]
    warnings: tuple[str, ...] = ()

    @property
    def replicas(self) -> dict[str, int]:
        """How many to ask for, by pool."""
        return {each.pool: each.after for each in self.decisions}


@dataclass(frozen=True, slots=True)
class _Group:
    """What one tick found about a group."""

    demand: Demand
    expected: float
    has: Capacity
    needs: Need
    before: Mapping[str, int]
    after: Mapping[str, int]
    why: str


def plan(
    pools: Sequence[PoolState], memory: PlanMemory, now: float, settings: PlanSettings
) -> tuple[Plan, PlanMemory]:
    """Decide on all pools together; pure, and it never raises.

    Args:
        pools: All pools there are, in any order.
        memory: What the tick before returned; `PlanMemory()` at first.
        now: Seconds of a clock that never goes back.
        settings: How to decide.

    Returns:
        The plan, and what to hand in at the next tick.
    """
    try:
        return _plan(pools, memory, now, settings)
    except Exception as error:
        # An exception here would wedge Serve; everything stays as it is until it is understood.
        _log.exception("the plan failed")
        return _as_it_is(pools, f"the plan failed, nothing changes: {error!r}"), memory


def _plan(
    pools: Sequence[PoolState], memory: PlanMemory, now: float, settings: PlanSettings
) -> tuple[Plan, PlanMemory]:
    warnings: list[str] = []
    if not math.isfinite(now):
        warnings.append("the time is not a number; no time has passed")
        now = memory.at if memory.at is not None else 0.0
    clean = intake(pools, settings, warnings)
    busy = {pool.model for pool in clean if pool.busy or has_accepted(pool, memory.counters)}
    busy_at = {pool.model: memory.busy_at.get(pool.model, now) for pool in clean}
    busy_at |= dict.fromkeys(busy, now)
    decisions: list[PoolDecision] = []
    groups: dict[tuple[str, str], GroupMemory] = {}
    counters: dict[str, Any] = {}
    flows: dict[str, float] = {}
    # Denoisers before decoders, whose work is what denoisers will have finished.
    ordered = sorted(clean, key=lambda pool: (pool.stage == "decode", pool.group, pool.name))
    for key, members in groupby(ordered, key=lambda pool: pool.group):
        these = tuple(members)
        idle_s = now - busy_at[key[1]]
        group, groups[key], told = _decide(
            these, memory, flows.get(key[1], 0.0), key[1] in busy, idle_s, now, settings
        )
        counters.update(told)
        if key[0] == "denoise":
            flows[key[1]] = _requests_ahead(these, group)
        decisions.extend(_decision(pool, group, groups[key], now, settings) for pool in these)
    after = PlanMemory(
        at=now,
        groups=groups,
        counters=merged_counters(memory.counters, counters, now),
        queued={pool.name: pool.queued for pool in clean},
        busy_at=busy_at,
    )
    return Plan(tuple(sorted(decisions, key=lambda each: each.pool)), tuple(warnings)), after


def _decide(
    pools: tuple[Pool, ...],
    memory: PlanMemory,
    requests_ahead: float,
    is_busy: bool,
    idle_s: float,
    now: float,
    settings: PlanSettings,
) -> tuple[_Group, GroupMemory, dict[str, Any]]:
    """Decide on one group.

    Args:
        pools: Of the group.
        memory: Of the tick before.
        requests_ahead: A second, that the stage before will send; 0 if not known.
        is_busy: Its model has a request, at whatever stage.
        idle_s: Since it had one.
        now: Seconds.
        settings: How to decide.
    """
    before = {pool.name: min(max(pool.target, pool.minimum), pool.maximum) for pool in pools}
    kept = memory.groups.get(pools[0].group)
    demand, averages, told = watch(
        pools, kept.averages if kept else None, memory.counters, memory.queued, now, settings
    )
    expected = requests_ahead * _request_size(pools)
    has = capacity(pools, before, demand.before, settings)
    needs = need(pools, demand, expected, has, settings)
    blind = _is_blind(pools, settings)
    spans = with_span(
        kept.spans if kept else (),
        now,
        math.inf if blind else max(needs.enough, _SOME),
        settings.scale_in_after_s,
    )
    shrunk_at = kept.shrunk_at if kept else None
    surprised_at, peak = _surprise(kept, needs, now, settings)
    total = sum(before.values())
    most = max(math.floor(total * settings.scale_in_share), 1)
    fewer_now = not blind and shrunk(pools, before, max(needs.enough, _SOME), most) != before
    fewer_since = kept.fewer_since if kept and kept.fewer_since is not None else now
    short = needs.total - has.now - has.coming
    after, why = dict(before), ""
    if short > 1e-9:
        after = grown(pools, before, short, settings)
        why = growth_words(needs, has, demand.level, demand.ahead, expected)
        if after == before:
            why += ", all pools are at their maximum"
    elif idle_s >= settings.idle_after_s and not blind:
        after = {pool.name: pool.minimum for pool in pools}
        why = f"no request for {idle_s:.0f} s"
    elif _may_shrink(averages.since, shrunk_at, now, settings):
        enough = max(peak, *(each for _, each in spans))
        after = shrunk(pools, before, enough, most)
        why = f"fewer would have done for {settings.scale_in_after_s:.0f} s"
    if is_busy and not any(after.values()):
        after = grown(pools, after, _SOME, settings)
        why = "a request is on its way and there is no replica"
    if sum(after.values()) < total:
        shrunk_at = now
    group = _Group(demand, expected, has, needs, before, after, why)
    since = fewer_since if fewer_now else None
    return group, GroupMemory(averages, spans, shrunk_at, surprised_at, peak, since), told


def _surprise(
    kept: GroupMemory | None, needs: Need, now: float, settings: PlanSettings
) -> tuple[float | None, float]:
    """Return when work last waited far too long, and the capacity for the most that came since."""
    at, peak = (kept.surprised_at, kept.peak) if kept else (None, 0.0)
    if needs.backlog > 0 and needs.waiting_s > _FAR_TOO_LONG * needs.target_s:
        at = now
    if at is None or now - at >= settings.after_surprise_s:
        return None, 0.0
    return at, max(peak, needs.lasting)


def _may_shrink(since: float, shrunk_at: float | None, now: float, settings: PlanSettings) -> bool:
    watched = now - since >= settings.scale_in_after_s
    return watched and (shrunk_at is None or now - shrunk_at >= settings.scale_in_step_s)


def _is_blind(pools: Sequence[Pool], settings: PlanSettings) -> bool:
    present = sum(pool.present for pool in pools)
    silent = sum(
        int(np.count_nonzero(pool.reported_age_s > settings.stale_after_s)) for pool in pools
    )
    return silent > _BLIND_SHARE * present


def _request_size(pools: Sequence[Pool]) -> float:
    """Return reference seconds of a request of a group; 0 if none was told."""
    sizes = [pool.request_s * pool.kind_speed for pool in pools if pool.told_request_s]
    return sum(sizes) / len(sizes) if sizes else 0.0


def _requests_ahead(pools: Sequence[Pool], group: _Group) -> float:
    """Return requests a second that denoisers will hand on: all there are, as fast as they can.

    By their cool capacity, so that heat never makes it fewer.
    """
    size = _request_size(pools)
    if size <= 0:
        return 0.0
    can = sum(group.after[pool.name] * pool.kind_speed for pool in pools)
    cleared = group.needs.waiting / group.needs.target_s
    return min(group.demand.level + group.demand.ahead + cleared, can) / size


def _decision(
    pool: Pool, group: _Group, kept: GroupMemory, now: float, settings: PlanSettings
) -> PoolDecision:
    after = group.after[pool.name]
    told = derated(pool, settings)
    level = max(group.demand.level, group.expected)
    parts = [group.why if after != group.before[pool.name] or "maximum" in group.why else ""]
    if not parts[0]:
        parts = [rest_words(group.needs, group.has, level)]
        if kept.fewer_since is not None and after == pool.target:
            waited = now - kept.fewer_since
            parts.append(f"fewer would do since {waited:.0f} s of {settings.scale_in_after_s:.0f}")
    if group.before[pool.name] != pool.target:
        parts.append(f"its bounds are {pool.minimum} to {pool.maximum}")
    parts.append(heat_words(pool, told))
    waiting_s = group.needs.waiting_s
    return PoolDecision(
        pool=pool.name,
        before=pool.target,
        after=after,
        reason=sentence(pool, after, parts),
        capacity=float(pool.factor.sum()) * pool.kind_speed,
        demand=level,
        # Without a replica no speed is known: it takes at least as long as one takes to start.
        waiting_s=waiting_s if math.isfinite(waiting_s) else pool.start_s,
        derated=told,
    )


def _as_it_is(pools: Sequence[PoolState], warning: str) -> Plan:
    decisions = []
    for pool in pools if isinstance(pools, Sequence) else ():
        name, target = str(getattr(pool, "name", "")), getattr(pool, "target", 0)
        before = target if isinstance(target, int) else 0
        words = f"{name} stays at {before}: {warning}"
        decisions.append(PoolDecision(name, before, before, words, 0.0, 0.0, 0.0))
    return Plan(tuple(decisions), (warning,))
