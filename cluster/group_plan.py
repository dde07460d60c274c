"""What becomes of one group of pools: those of one stage and one model, which share their work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.demand import Counter, Demand, watch
from cluster.plan_memory import GroupMemory, PlanMemory, Surprise, with_span
from cluster.plan_pool import Pool
from cluster.plan_settings import PlanSettings
from cluster.plan_words import growth_words
from cluster.sizing import Capacity, Need, capacity, grown, need, shrunk

# With more than this share of a group's reports out of date, nothing is taken away from it.
_BLIND_SHARE = 0.25
# Some replica stays until the model has been idle for long, however small demand has become.
_SOME = 1e-6
# Of the most that came suddenly: with so little of it, it is over; with so much, it is there again.
_RECEDED, _AS_MUCH_AGAIN = 0.5, 0.8
# Of its target: work that has to wait for longer came faster than was planned for.
_TOO_LONG = 1.0


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """What one tick found and decided.

    Attributes:
        demand: Of the group itself.
        expected: Demand that the stage before will send.
        has: What it can do.
        needs: What it needs.
        before: Replicas asked for, within bounds, by pool.
        after: To be asked for, by pool.
        why: In words; empty if nothing changes and nothing is lacking.
        is_short: More is needed and cannot be had.
    """

    demand: Demand
    expected: float
    has: Capacity
    needs: Need
    before: Mapping[str, int]
    after: Mapping[str, int]
    why: str
    is_short: bool = False


def decide_group(
    pools: tuple[Pool, ...],
    memory: PlanMemory,
    requests_ahead: float,
    is_busy: bool,
    idle_s: float,
    now: float,
    settings: PlanSettings,
) -> tuple[GroupPlan, GroupMemory, dict[str, Counter]]:
    """Decide on one group.

    Args:
        pools: Of the group.
        memory: Of the tick before.
        requests_ahead: A second, that the stage before will send; 0 if not known.
        is_busy: Its model has a request, at whatever stage.
        idle_s: Since it had one.
        now: Seconds.
        settings: How to decide.

    Returns:
        What was decided, what to remember of the group, and the counters of its replicas.
    """
    before = {pool.name: min(max(pool.target, pool.minimum), pool.maximum) for pool in pools}
    kept = memory.groups.get(pools[0].group)
    demand, averages, told = watch(
        pools, kept.averages if kept else None, memory.counters, memory.queued, now, settings
    )
    expected = requests_ahead * request_size(pools)
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
    surprise = _surprise(kept, needs, now, settings)
    total = sum(before.values())
    most = max(math.floor(total * settings.scale_in_share), 1)
    fewer_now = not blind and shrunk(pools, before, max(needs.enough, _SOME), most) != before
    fewer_since = kept.fewer_since if kept and kept.fewer_since is not None else now
    short = needs.total - has.now - has.coming
    after, why = dict(before), ""
    if short > 1e-9:
        after = grown(pools, before, short)
        why = growth_words(needs, has, demand.level, demand.ahead, expected)
        if after == before:
            late = any(pool.late for pool in pools)
            why += ", " + ("the rest does not start" if late else "all pools are at their maximum")
    elif idle_s >= settings.idle_after_s and not blind:
        after = {pool.name: pool.minimum for pool in pools}
        why = f"no request for {idle_s:.0f} s"
    elif _may_shrink(averages.since, shrunk_at, now, settings):
        enough = max(surprise.peak if surprise else 0.0, *(each for _, each in spans))
        after = shrunk(pools, before, enough, most)
        why = f"fewer would have done for {settings.scale_in_after_s:.0f} s"
    if is_busy and not any(after.values()):
        after = grown(pools, after, _SOME)
        why = "a request is on its way and there is no replica"
    if sum(after.values()) < total:
        shrunk_at = now
    is_short = short > 1e-9 and after == before
    group = GroupPlan(demand, expected, has, needs, before, after, why, is_short)
    since = fewer_since if fewer_now else None
    return group, GroupMemory(averages, spans, shrunk_at, surprise, since), told


def _surprise(
    kept: GroupMemory | None, needs: Need, now: float, settings: PlanSettings
) -> Surprise | None:
    """Return what is remembered of sudden work; None: none came lately."""
    before = kept.surprise if kept else None
    if needs.backlog > 0 and needs.waiting_s > _TOO_LONG * needs.target_s:
        return Surprise(now, max(before.peak if before else 0.0, needs.lasting), receded=False)
    if before is None:
        return None
    if before.receded and needs.lasting > _AS_MUCH_AGAIN * before.peak:
        # It came again and waited for nobody, because replicas had stayed for it.
        return Surprise(now, max(before.peak, needs.lasting), receded=False)
    if now - before.at >= settings.after_surprise_s:
        return None
    if not before.receded and needs.lasting < _RECEDED * before.peak:
        return Surprise(now, before.peak, receded=True)
    return Surprise(before.at, max(before.peak, needs.lasting), before.receded)


def _may_shrink(since: float, shrunk_at: float | None, now: float, settings: PlanSettings) -> bool:
    watched = now - since >= settings.scale_in_after_s
    return watched and (shrunk_at is None or now - shrunk_at >= settings.scale_in_step_s)


def _is_blind(pools: Sequence[Pool], settings: PlanSettings) -> bool:
    present = sum(pool.present for pool in pools)
    silent = sum(
        int(np.count_nonzero(pool.reported_age_s > settings.stale_after_s)) for pool in pools
    )
    return silent > _BLIND_SHARE * present


def request_size(pools: Sequence[Pool]) -> float:
    """Return reference seconds of a request of a group; 0 if none was told."""
    sizes = [pool.request_s * pool.kind_speed for pool in pools if pool.told_request_s]
    return sum(sizes) / len(sizes) if sizes else 0.0
