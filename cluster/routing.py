"""Where will it finish first: which replica of a pool, and which pool.

Queued work over present speed says when a replica would have done a request. Three things are added
in the same unit, seconds, so that each gives way when the others weigh more:

- Heat. A card close to its limit counts as slower than it is, and as some seconds further away, so
  its share of new work falls to almost nothing while cooler cards have room. It is used again when
  all are hot or when everything else is far more loaded.
- What a request wants at hand, such as a LoRA: each thing missing costs what fetching it takes.
  And what it can join: requests of its own size share forwards with it, which gains some time.
- Chance. Several Pipelines know nearly the same of each replica; if all of them took the minimum,
  they would all send to the same one until they heard otherwise. So each estimate is blurred by
  what others may have sent since the replica last told of itself.

Who has told nothing at all is chosen by the power of two choices (Mitzenmacher, IEEE Transactions
on Parallel and Distributed Systems 12, 2001), by what this process has itself in flight there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

# Slower than this counts as this: a replica that stands still is far away, not infinitely far.
_LEAST_SPEED = 0.01
_MOST_SPEED = 100.0
_MOST_S = 86_400.0


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """How replicas are weighed.

    Attributes:
        heat: Whether margins and throttling count; without, only backlog and speed.
        near_limit_c: At this margin avoiding begins, below the 5 C at which the governor holds a
            card: who is held there does what it says it does.
        at_limit_c: At this margin a card is avoided as much as it ever is.
        hot_speed: Share of its speed that an avoided card counts with.
        hot_wait_s: Seconds that an avoided card counts as further away.
        joined_share: Of its own time, that a request gains beside others of its size.
        stale_after_s: What a replica told of its backlog longer ago than this says less and less,
            until at twice the age it counts as one like all the others.
        heat_stale_after_s: The same for heat, which changes more slowly. An avoided replica has no
            work to tell of its heat with: when this is over it gets a request, and tells.
        blur: Seconds of work that others may have sent to a replica for each second since it told
            of itself: the width of chance. 0 takes the minimum of what was told, and makes herds.
        tie: Share of a request's own time within which replicas count as equally good.
        full_s: Seconds of work with which a replica is full, see `LoadBoard.is_full`; five requests
            of a usual size on an H100.
        full_requests: Requests with which it is full where they take long.
        usual_s: Cool seconds of a request of which nothing is known.
    """

    heat: bool = True
    near_limit_c: float = 6.0
    at_limit_c: float = 1.0
    hot_speed: float = 0.25
    hot_wait_s: float = 3.0
    joined_share: float = 0.1
    stale_after_s: float = 5.0
    heat_stale_after_s: float = 20.0
    blur: float = 0.5
    tie: float = 0.05
    full_s: float = 10.0
    full_requests: float = 4.0
    usual_s: float = 1.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What routing knows of a replica.

    Attributes:
        id: Of the replica.
        backlog_s: Cool seconds that it holds.
        speed: Cool seconds that it does a second.
        margin_c: Degrees to the limit of its card; None if not known.
        throttled: Its card is being slowed down for heat.
        age_s: Since it told this. None: it never told anything, and `backlog_s` is what this
            process has in flight there.
        holds: What it has at hand and what it works on, as free-form keys.
    """

    id: str
    backlog_s: float
    speed: float = 1.0
    margin_c: float | None = None
    throttled: bool = False
    age_s: float | None = None
    holds: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RoutedWork:
    """What is to be sent somewhere.

    Attributes:
        cool_s: Cool seconds that it takes: on the pool in question, or on an H100 where pools are
            compared. None: not known.
        wants: Key -> seconds that it takes longer where the replica does not hold the key.
        joins: Key -> seconds that it gains where the replica holds the key and has work to do;
            never more than what that work takes.
    """

    cool_s: float | None = None
    wants: Mapping[str, float] = field(default_factory=dict)
    joins: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """What is known of a pool, for choosing among pools.

    Attributes:
        name: Of the pool.
        soonest_s: In which its best replica would have done the work (`LoadBoard.soonest`); None:
            it has no replica.
        kind_speed: Of its kind of card, an H100 being 1.
        queued_s: Cool seconds that wait for any of its replicas, outside of them.
        speed: Cool seconds that all its replicas together do a second.
        start_s: What a replica takes to start.
        waited_s: For how long the first of what waits outside has waited. Where no replica came in
            all that time, it is thought to take as long again.
    """

    name: str
    soonest_s: float | None
    kind_speed: float = 1.0
    queued_s: float = 0.0
    speed: float = 1.0
    start_s: float = 60.0
    waited_s: float = 0.0


def choose_pool(
    pools: Sequence[PoolLoad], work: RoutedWork, random: Random, settings: RoutingSettings
) -> str:
    """Return the pool where the work will be done first.

    Args:
        pools: Candidates, at least one.
        work: To be sent, in cool seconds of an H100.
        random: Source of chance, among pools that are about as good.
        settings: How to weigh.

    Raises:
        ValueError: There is no pool.
    """
    if not pools:
        raise ValueError("There is no pool to choose from.")
    own = seconds_of(work, settings.usual_s)

    def finish(pool: PoolLoad) -> float:
        alone = own / max(pool.kind_speed, 1e-6)
        # The replica that an empty pool will have does a cool second a second.
        speed = 1.0 if pool.soonest_s is None else max(pool.speed, _LEAST_SPEED)
        waits = told_seconds(pool.queued_s) / speed
        starts = max(pool.start_s, told_seconds(pool.waited_s))
        done = starts + alone if pool.soonest_s is None else pool.soonest_s
        return told_seconds(done) + waits + random.random() * settings.tie * alone

    return min(pools, key=finish).name


def seconds_of(work: RoutedWork, usual_s: float) -> float:
    """Return cool seconds of the work, `usual_s` where it does not say."""
    told = work.cool_s
    if told is None or not math.isfinite(told) or told <= 0:
        return usual_s
    return min(told, _MOST_S)


def told_seconds(value: float) -> float:
    """Return seconds that can be true: 0 for what is negative or not a number."""
    return min(max(value, 0.0), _MOST_S) if value == value else 0.0


def told_speed(value: float) -> float:
    """Return a speed that can be true: 1 for what is not a number."""
    return min(max(value, _LEAST_SPEED), _MOST_SPEED) if value == value else 1.0
