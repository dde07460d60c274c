"""What the plan remembers between two ticks: a value, so that the plan stays a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.demand import Averages, Counter
from cluster.starts import Starts

_SPANS = 12
_FORGET_AFTER_S = 300.0


@dataclass(frozen=True, slots=True)
class Surprise:
    """Work that came so suddenly that it waited for far too long.

    Attributes:
        at: When it last did, about as much came again, or it was over.
        peak: Cool capacity for the most that came since it began.
        receded: It has gone since then.
    """

    at: float
    peak: float
    receded: bool


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """What is remembered of the pools of one stage and one model.

    Attributes:
        averages: Of demand.
        spans: When each span of the recent past began, and the most cool capacity in it that would
            have been enough; oldest first.
        shrunk_at: When replicas were last taken away.
        surprise: None: none lately.
        fewer_since: Since when fewer replicas would do; None: they would not.
    """

    averages: Averages
    spans: tuple[tuple[float, float], ...] = ()
    shrunk_at: float | None = None
    surprise: Surprise | None = None
    fewer_since: float | None = None


@dataclass(frozen=True, slots=True)
class PlanMemory:
    """All that the plan remembers; `PlanMemory()` remembers nothing.

    Attributes:
        at: Of the tick before; None: there was none.
        groups: By stage and model.
        counters: Of replicas, by id.
        queued: Requests outside of each pool's replicas, by pool.
        starts: Of each pool.
        step_s: Cool seconds of each pool's usual step, as last told.
        busy_at: When each model last had a request, or was first seen.
    """

    at: float | None = None
    groups: Mapping[tuple[str, str], GroupMemory] = field(default_factory=dict)
    counters: Mapping[str, Counter] = field(default_factory=dict)
    queued: Mapping[str, float] = field(default_factory=dict)
    starts: Mapping[str, Starts] = field(default_factory=dict)
    step_s: Mapping[str, float] = field(default_factory=dict)
    busy_at: Mapping[str, float] = field(default_factory=dict)


def with_span(
    spans: tuple[tuple[float, float], ...], now: float, enough: float, over_s: float
) -> tuple[tuple[float, float], ...]:
    """Return the spans with what is enough now, without those that ended before `over_s`."""
    length = over_s / _SPANS
    if spans and now - spans[-1][0] < length:
        began, most = spans[-1]
        spans = (*spans[:-1], (began, max(most, enough)))
    else:
        spans = (*spans, (now, enough))
    return tuple(each for each in spans if now - each[0] <= over_s + length)


def merged_counters(
    before: Mapping[str, Counter], told: dict[str, Counter], now: float
) -> dict[str, Counter]:
    """Return the new counters and those of replicas that were seen not long ago.

    A replica that is missing for some ticks must not count all its work again when it comes back.
    """
    for name in before.keys() - told.keys():
        if now - before[name].seen_at <= _FORGET_AFTER_S:
            told[name] = before[name]
    return told
