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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cluster.demand import Counter, has_accepted
from cluster.derating import derating
from cluster.group_plan import GroupPlan, decide_group, request_size
from cluster.learnt_speeds import told_steps, with_learnt_speeds
from cluster.plan_intake import intake
from cluster.plan_memory import GroupMemory, PlanMemory, merged_counters
from cluster.plan_pool import Pool
from cluster.plan_settings import PlanSettings
from cluster.plan_words import (
    Derated,
    derated,
    derated_count,
    heat_words,
    rest_words,
    sentence,
    start_words,
)
from cluster.pool_state import PoolState
from cluster.starts import follow, with_starts

__all__ = [
    "Plan",
    "PlanMemory",
    "PlanSettings",
    "PoolDecision",
    "derating",
    "plan",
]


@dataclass(frozen=True, slots=True)
class PoolDecision:
    """What is to become of one pool.

    Attributes:
        pool: Its name.
        stage: Of the pool.
        model: Of the pool; demand and what waits are of all pools of one stage and model.
        before: Replicas that were asked for.
        after: That are to be asked for.
        reason: In words.
        capacity: Reference seconds of work that the pool's replicas do a second now.
        demand: Reference seconds of work a second that come to the pools of its stage and model.
        waiting_s: Seconds until what waits at its stage and model has begun, at the present speed.
        kind_speed: Of a cool card of its kind, an H100 being 1: set, measured, or an estimate.
        derated: Replicas that do not count in full: id, factor, why; the worst twenty.
        derated_count: How many there are.
    """

    pool: str
    stage: str
    model: str
    before: int
    after: int
    reason: str
    capacity: float
    demand: float
    waiting_s: float
    kind_speed: float = 1.0
    derated: Derated = ()
    derated_count: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions of one tick.

    Attributes:
        decisions: By name of pool.
        warnings: What was wrong with what was told.
        error: What the plan itself failed with, so that nothing changes; whoever asked tells it.
    """

    decisions: tuple[PoolDecision, ...]
    warnings: tuple[str, ...] = ()
    error: Exception | None = None

    @property
    def replicas(self) -> dict[str, int]:
        """How many to ask for, by pool."""
        return {each.pool: each.after for each in self.decisions}


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
        return _as_it_is(pools, error), memory


def _plan(
    pools: Sequence[PoolState], memory: PlanMemory, now: float, settings: PlanSettings
) -> tuple[Plan, PlanMemory]:
    warnings: list[str] = []
    if not math.isfinite(now):
        warnings.append("the time is not a number; no time has passed")
        now = memory.at if memory.at is not None else 0.0
    clean = intake(pools, settings, warnings)
    step_s = {**memory.step_s, **told_steps(clean)}
    starts = {
        pool.name: follow(
            memory.starts.get(pool.name), pool.present, pool.target, pool.start_s, now, settings
        )
        for pool in clean
    }
    clean = tuple(with_starts(pool, starts[pool.name], now, settings) for pool in clean)
    clean = with_learnt_speeds(clean, step_s)
    busy = {pool.model for pool in clean if pool.busy or has_accepted(pool, memory.counters)}
    busy_at = {pool.model: memory.busy_at.get(pool.model, now) for pool in clean}
    busy_at |= dict.fromkeys(busy, now)
    decisions: list[PoolDecision] = []
    groups: dict[tuple[str, str], GroupMemory] = {}
    counters: dict[str, Counter] = {}
    flows: dict[str, float] = {}
    # Denoisers before decoders, whose work is what denoisers will have finished.
    ordered = sorted(clean, key=lambda pool: (pool.stage == "decode", pool.group, pool.name))
    for key, members in groupby(ordered, key=lambda pool: pool.group):
        these = tuple(members)
        idle_s = now - busy_at[key[1]]
        group, groups[key], told = decide_group(
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
        starts=starts,
        step_s=step_s,
        busy_at=busy_at,
    )
    return Plan(tuple(sorted(decisions, key=lambda each: each.pool)), tuple(warnings)), after


def _requests_ahead(pools: Sequence[Pool], group: GroupPlan) -> float:
    """Return requests a second that denoisers will hand on: all there are, as fast as they can.

    By their cool capacity, so that heat never makes it fewer.
    """
    size = request_size(pools)
    if size <= 0:
        return 0.0
    can = sum(group.after[pool.name] * pool.kind_speed for pool in pools)
    cleared = group.needs.waiting / group.needs.target_s
    return min(group.demand.level + group.demand.ahead + cleared, can) / size


def _decision(
    pool: Pool, group: GroupPlan, kept: GroupMemory, now: float, settings: PlanSettings
) -> PoolDecision:
    after = group.after[pool.name]
    told = derated(pool, settings)
    level = max(group.demand.level, group.expected)
    parts = [group.why if after != group.before[pool.name] or group.is_short else ""]
    if not parts[0]:
        parts = [rest_words(group.needs, group.has, level)]
        if kept.fewer_since is not None and after == pool.target:
            waited = now - kept.fewer_since
            parts.append(f"fewer would do since {waited:.0f} s of {settings.scale_in_after_s:.0f}")
    if group.before[pool.name] != pool.target:
        parts.append(f"its bounds are {pool.minimum} to {pool.maximum}")
    parts.append(start_words(pool))
    parts.append(heat_words(pool, told))
    waiting_s = group.needs.waiting_s
    return PoolDecision(
        pool=pool.name,
        stage=pool.stage,
        model=pool.model,
        before=pool.target,
        after=after,
        reason=sentence(pool, after, parts),
        capacity=float(pool.factor.sum()) * pool.kind_speed,
        demand=level,
        # Without a replica no speed is known: it takes at least as long as one takes to start.
        waiting_s=waiting_s if math.isfinite(waiting_s) else pool.start_s,
        kind_speed=pool.kind_speed,
        derated=told,
        derated_count=derated_count(pool),
    )


def _as_it_is(pools: Sequence[PoolState], error: Exception) -> Plan:
    warning = f"the plan failed, nothing changes: {error!r}"
    decisions = []
    for pool in pools if isinstance(pools, Sequence) else ():
        name, target = str(getattr(pool, "name", "")), getattr(pool, "target", 0)
        before = target if isinstance(target, int) else 0
        words = f"{name} stays at {before}: {warning}"
        decisions.append(
            PoolDecision(
                pool=name,
                stage=str(getattr(pool, "stage", "")),
                model=str(getattr(pool, "model", "")),
                before=before,
                after=before,
                reason=words,
                capacity=0.0,
                demand=0.0,
                waiting_s=0.0,
            )
        )
    return Plan(tuple(decisions), (warning,), error)
