"""Pools as the plan reckons with them: arrays, cleaned of whatever cannot be true.

The plan runs inside Ray Serve's controller, which an exception wedges, on numbers that came over
the network. So nothing here raises; what is not a number, negative or beyond belief is replaced by
the value that assumes least, and a warning says so once a pool.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from cluster.derating import Flags, Floats, factors
from cluster.learnt_speeds import behind_peers, usual_step_s
from cluster.plan_pool import Pool
from cluster.plan_settings import PlanSettings
from cluster.pool_state import PoolState, ReplicaState

_FIELDS = (
    "waiting_s",
    "running_s",
    "requests",
    "accepted",
    "accepted_s",
    "age_s",
    "reading_age_s",
    "slowdown",
    "duty",
    "margin_c",
    "throttled",
    "scripted",
    "step_s",
)
_read_fields = attrgetter(*_FIELDS)
# Of replicas that stop nothing depends on; beyond these a number is a fault, not a load.
_MOST_HELD_S = 86_400.0
_MOST_COUNTED = 1e12
_MOST_MARGIN_C = 200.0
# Faster than its cool baseline by more than this is a poor baseline, not a fast card.
_LEAST_SLOWDOWN, _MOST_SLOWDOWN = 0.8, 1000.0
_LEAST_DUTY = 0.01
UNTOLD_REQUEST_S = 1.0
"""Cool seconds that a request is taken for where none ever came."""


def intake(
    pools: Iterable[PoolState], settings: PlanSettings, warnings: list[str]
) -> tuple[Pool, ...]:
    """Clean all pools, in the order of their names.

    Args:
        pools: As told.
        settings: Of the plan.
        warnings: Appended to, in words.
    """
    clean: dict[str, Pool] = {}
    for state in pools:
        if not isinstance(state, PoolState):
            warnings.append(f"not a pool: {type(state).__name__}")
            continue
        name = str(state.name)
        if name in clean:
            warnings.append(f"{name}: told of twice; the first counts")
            continue
        clean[name] = _pool(name, state, settings, warnings)
    return tuple(clean[name] for name in sorted(clean))


def _pool(name: str, state: PoolState, settings: PlanSettings, warnings: list[str]) -> Pool:
    bad: set[str] = set()

    def number(field: str, default: float, least: float, most: float) -> float:
        told = getattr(state, field)
        value = _float(told)
        if math.isnan(value) or not least <= value <= most:
            bad.add(field)
        return default if math.isnan(value) else min(max(value, least), most)

    minimum = int(number("minimum", 0, 0, 1e6))
    maximum = int(number("maximum", minimum, 0, 1e6))
    if maximum < minimum:
        bad.add("minimum")
        minimum = maximum
    replicas, told_ids = _without_doubles(state.replicas, bad)
    columns = dict(zip(_FIELDS, _columns(replicas, bad).T, strict=True))
    waiting = _cleaned(columns, "waiting_s", _MOST_HELD_S, bad)
    held = waiting + _cleaned(columns, "running_s", _MOST_HELD_S, bad)
    requests = _cleaned(columns, "requests", _MOST_COUNTED, bad)
    accepted_s = _cleaned(columns, "accepted_s", _MOST_COUNTED, bad)
    age = _age(columns, "age_s")
    if np.isinf(age).any():
        bad.add("age_s")
    measured, margin, throttled = _heat(columns, age, settings, bad)
    usual_s = usual_step_s(columns["step_s"])
    if settings.heat and usual_s is not None:
        measured = measured / behind_peers(columns["step_s"], usual_s)
    factor = np.minimum(measured, factors(margin, throttled, settings))
    target = int(number("target", len(told_ids), 0, 1e6))
    request_s = _float(state.request_s)
    told_request_s = math.isfinite(request_s) and 0 < request_s <= _MOST_HELD_S
    if state.request_s is not None and not told_request_s:
        bad.add("request_s")
    queued = number("queued", 0.0, 0.0, 1e6)
    if bad:
        warnings.append(f"{name}: what cannot be true was replaced in {', '.join(sorted(bad))}")
    # Text encoders and decoders read no card: what they do in a second heats nothing.
    if settings.heat and len(told_ids) and str(state.kind) != "CPU" and state.stage == "denoise":
        unknown = int((np.isnan(margin) & ~throttled).sum())
        if unknown:
            warnings.append(
                f"{name}: {unknown} of {len(told_ids)} cards tell no fresh temperature; they are "
                "planned for by queue and measured speed alone"
            )
    return Pool(
        name=name,
        stage=str(state.stage),
        model=str(state.model),
        kind=str(state.kind),
        ids=told_ids,
        target=target,
        minimum=minimum,
        maximum=maximum,
        queued=queued,
        request_s=request_s if told_request_s else UNTOLD_REQUEST_S,
        told_request_s=told_request_s,
        kind_speed=number("kind_speed", 1.0, 1e-6, 1e3),
        is_estimate=bool(state.is_estimate),
        cost_per_hour=number("cost_per_hour", 1.0, 1e-9, 1e9),
        start_s=number("start_s", 60.0, 0.0, 3600.0),
        waiting_s=np.maximum(waiting, _behind_others(held, requests)),
        held_s=held,
        accepted_s=accepted_s,
        reported_age_s=age,
        measured=measured,
        margin_c=margin,
        throttled=throttled,
        factor=factor,
        usual_factor=float(np.median(factor)) if len(factor) else 1.0,
        scripted=columns["scripted"] > 0,
        usual_step_s=usual_s,
        busy=bool(queued > 0 or requests.any() or held.any()),
    )


def _without_doubles(told: Any, bad: set[str]) -> tuple[list[Any], tuple[str, ...]]:
    try:
        replicas = [each for each in told if isinstance(each, ReplicaState)]
    except TypeError:
        replicas = []
    if not isinstance(told, tuple) or len(replicas) < len(told):
        bad.add("replicas")
    ids = [str(each.id) for each in replicas]
    if len(set(ids)) == len(ids):
        return replicas, tuple(ids)
    bad.add("ids of replicas")
    first = dict(zip(reversed(ids), reversed(replicas), strict=True))
    return list(first.values()), tuple(first)


def _columns(replicas: Sequence[Any], bad: set[str]) -> Floats:
    """Return all numbers of all replicas, shape (replicas, fields); None becomes NaN."""
    rows = [_read_fields(each) for each in replicas]
    if not rows:
        return np.empty((0, len(_FIELDS)))
    try:
        return np.array(rows, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        bad.add("types of numbers")
        return np.array([[_float(value) for value in row] for row in rows])


def _heat(
    columns: dict[str, Floats], age: Floats, settings: PlanSettings, bad: set[str]
) -> tuple[Floats, Floats, Flags]:
    """Return measured speed, margin and throttling, as far as they are fresh and asked for."""
    count = len(age)
    if not settings.heat:
        return np.ones(count), np.full(count, np.nan), np.zeros(count, dtype=np.bool_)
    reported = age <= settings.stale_after_s
    read = reported & (_age(columns, "reading_age_s") <= settings.stale_after_s)
    slowdown = columns["slowdown"]
    if (np.isinf(slowdown) | (slowdown <= 0)).any():
        bad.add("slowdown")
    known = np.isfinite(slowdown) & (slowdown > 0)
    slowdown = np.where(known, slowdown, 1.0).clip(_LEAST_SLOWDOWN, _MOST_SLOWDOWN)
    duty = columns["duty"]
    if not ((duty >= 0) & (duty <= 1)).all():
        bad.add("duty")
    duty = np.where(np.isnan(duty), 1.0, duty).clip(_LEAST_DUTY, 1.0)
    margin = columns["margin_c"]
    if np.isinf(margin).any():
        bad.add("margin_c")
    margin = np.where(read & np.isfinite(margin), margin, np.nan)
    return (
        np.where(reported, duty / slowdown, 1.0),
        margin.clip(-_MOST_MARGIN_C, _MOST_MARGIN_C),
        read & (columns["throttled"] > 0),
    )


def _behind_others(held_s: Floats, requests: Floats) -> Floats:
    """Return what a replica holds beyond one request.

    A denoiser begins many requests and lets them share its card, so few are told of as waiting.
    """
    return held_s * (1.0 - 1.0 / np.maximum(requests, 1.0))


def _cleaned(columns: dict[str, Floats], field: str, most: float, bad: set[str]) -> Floats:
    values = columns[field]
    if not ((values >= 0) & (values <= most)).all():
        bad.add(field)
    return np.where(values >= 0, np.minimum(values, most), 0.0)


def _age(columns: dict[str, Floats], field: str) -> Floats:
    values = columns[field]
    return np.where(values > -np.inf, np.maximum(values, 0.0), np.inf)


def _float(value: Any) -> float:
    """Return the value as a float; NaN if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
