"""How much capacity a group of pools needs, and which pools give it; reference seconds a second.

Out and in are asked different questions. Out: does what runs and starts, as hot as it is now, bear
the work that comes and clear what waits? In: how much cool capacity would bear the work if its
cards ran at the target utilisation, as hot as that would make them? The second is never smaller, so
a group does not swing between the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.demand import Demand
from cluster.derating import factors
from cluster.plan_pool import Pool
from cluster.plan_settings import PlanSettings

# A forecast is no use beyond this: what comes in a quarter of an hour is decided later.
_MOST_AHEAD_S = 900.0
_ENOUGH = 1 - 1e-9
_LEAST_WORTH = 0.05


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a group can do; reference seconds a second.

    Attributes:
        now: Replicas that take requests, as hot as they are.
        coming: Replicas that start, but for those that should have long ago.
        cool: All of these, cool.
        loaded: Share of itself that cool capacity is worth when cards run at the target
            utilisation, as hot as that would make them.
    """

    now: float
    coming: float
    cool: float
    loaded: float


@dataclass(frozen=True, slots=True)
class Need:
    """Capacity that a group needs; reference seconds a second.

    Attributes:
        demand: To keep to the target utilisation.
        backlog: On top, to clear what waits too long.
        lasting: Cool capacity for what comes alone, once nothing waits.
        enough: Cool capacity with which fewer replicas would do.
        waiting: Reference seconds of work that wait.
        waiting_s: Seconds that waiting work takes at the present speed; infinite without replicas.
        target_s: Seconds that it may take.
    """

    demand: float
    backlog: float
    lasting: float
    enough: float
    waiting: float
    waiting_s: float
    target_s: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.demand + self.backlog


def worth(pool: Pool) -> float:
    """What one replica more is worth: of the pool's kind, as hot as its cards usually are now."""
    return pool.kind_speed * max(pool.usual_factor, _LEAST_WORTH)


def capacity(
    pools: Sequence[Pool], counts: Mapping[str, int], usual: float, settings: PlanSettings
) -> Capacity:
    """Add up what the pools of a group can do.

    Args:
        pools: Of the group.
        counts: Replicas that are asked for, by pool, within bounds.
        usual: Demand as it was a tick before.
        settings: Of the plan.
    """
    now = coming = cool = ready = 0.0
    for pool in pools:
        # Fewer are asked for than run: some are on their way out.
        asked = counts[pool.name]
        staying = min(asked / pool.present, 1.0) if pool.present else 0.0
        now += float(pool.factor.sum()) * pool.kind_speed * staying
        coming += max(asked - pool.present - pool.late, 0) * worth(pool)
        cool += max(asked - pool.late, min(asked, pool.present)) * pool.kind_speed
        ready += pool.present * pool.kind_speed
    # How much hotter than now the cards would be: from the load they bear now, as cool cards would.
    used = min(usual / ready, 1.0) if ready > 0 else 0.0
    hotter = max(settings.target_utilisation - used, 0.0) * settings.full_load_rise_c
    loaded = sum(_factors_when_hotter(pool, hotter, settings) * pool.kind_speed for pool in pools)
    return Capacity(now, coming, cool, loaded / ready if ready > 0 else 1.0)


def _factors_when_hotter(pool: Pool, by_c: float, settings: PlanSettings) -> float:
    foretold = factors(pool.margin_c - by_c, pool.throttled, settings)
    return float(np.minimum(pool.measured, foretold).sum())


def need(
    pools: Sequence[Pool], demand: Demand, expected: float, has: Capacity, settings: PlanSettings
) -> Need:
    """Reckon what a group needs.

    Args:
        pools: Of the group.
        demand: Of the group itself.
        expected: Demand that other stages will send here; 0 if none.
        has: What it can do.
        settings: Of the plan.
    """
    level = max(demand.level + demand.ahead, expected)
    # A single replica's speed: what comes in units of it is what queues.
    unit = max((pool.kind_speed for pool in pools), default=1.0)
    waiting = sum((float(pool.waiting_s.sum()) + pool.queued_s) * pool.kind_speed for pool in pools)
    start_s = min(min((pool.start_s for pool in pools), default=0.0), _MOST_AHEAD_S)
    # What runs and starts clears some of it before one more replica could begin.
    spare = max(has.now + has.coming / 2 - level, 0.0)
    own_s = min((pool.request_s for pool in pools), default=0.0)
    target_s = max(settings.target_wait_s, own_s, 0.1)
    backlog = max(waiting - target_s * has.now - spare * start_s, 0.0) / target_s
    lasting = _for_rate(max(demand.level, expected), unit, settings)
    lasting /= max(1 - settings.scale_in_band, 0.1)
    enough = max(_for_rate(level, unit, settings) + backlog, lasting)
    return Need(
        demand=_for_rate(level, unit, settings),
        backlog=backlog,
        lasting=lasting / max(has.loaded, 1e-3),
        enough=enough / max(has.loaded, 1e-3),
        waiting=waiting,
        waiting_s=waiting / has.now if has.now > 0 else math.inf if waiting > 0 else 0.0,
        target_s=target_s,
    )


def _for_rate(rate: float, unit: float, settings: PlanSettings) -> float:
    """Return the capacity that keeps waits short under a rate of work."""
    utilised = rate / min(max(settings.target_utilisation, 0.05), 1.0)
    return max(utilised, rate + settings.burst_reserve * math.sqrt(rate * unit))


def grown(pools: Sequence[Pool], counts: Mapping[str, int], short: float) -> dict[str, int]:
    """Add replicas worth `short`, where cool capacity is cheapest, within the maxima.

    Pools whose cards are hot come late: a new replica would be as hot. Last of all come those where
    what was asked for did not start; what is still asked for there is not asked for again.
    """
    after = dict(counts)

    def price(pool: Pool) -> tuple[bool, float, str]:
        return pool.is_unreliable, pool.cost_per_hour / worth(pool), pool.name

    for pool in sorted(pools, key=price):
        if short <= 0:
            break
        wanted = math.ceil(short / worth(pool) * _ENOUGH) - pool.late
        more = min(wanted, pool.maximum - after[pool.name])
        if more > 0:
            after[pool.name] += more
            short -= more * worth(pool)
    return after


def shrunk(
    pools: Sequence[Pool], counts: Mapping[str, int], enough: float, most: int
) -> dict[str, int]:
    """Take away replicas, the dearest for what they do first, as long as `enough` remains.

    What remains is what runs: nothing that runs goes for something that only starts. Of a pool
    those go first that start.

    Args:
        pools: Of the group.
        counts: Replicas of each by name.
        enough: Cool capacity that must remain.
        most: Replicas to take away.
    """
    after = dict(counts)
    spare = sum(min(after[pool.name], pool.present) * pool.kind_speed for pool in pools) - enough
    if spare < 0:
        return after
    for pool in sorted(pools, key=lambda pool: (-pool.cost_per_hour / worth(pool), pool.name)):
        starting = max(after[pool.name] - pool.present, 0)
        running = math.floor(spare / pool.kind_speed + 1e-9)
        fewer = min(starting + running, after[pool.name] - pool.minimum, most)
        if fewer > 0:
            after[pool.name] -= fewer
            spare -= max(fewer - starting, 0) * pool.kind_speed
            most -= fewer
    return after
