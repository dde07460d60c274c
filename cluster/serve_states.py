"""From what Ray Serve's autoscaler knows of a deployment to a `PoolState`.

Serve keeps each replica's statistics as short series and hands out means over its look-back period;
the plan wants what is true now, so the newest value of each series is taken. How old that is, is
measured by when it was first seen here: clocks of different machines are never compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.pool_state import PoolState, ReplicaState, Stage
from cluster.reported_numbers import NUMBERS, from_numbers

# Every report has it, so its newest point dates the report.
_DATES_REPORT = "accepted"


class Context(Protocol):
    """What is used of Ray Serve's `AutoscalingContext`."""

    @property
    def target_num_replicas(self) -> int:
        """That are asked for at present."""

    @property
    def running_replicas(self) -> Sequence[Any]:
        """Their ids, with `unique_id`."""

    @property
    def capacity_adjusted_min_replicas(self) -> int:
        """Never fewer."""

    @property
    def capacity_adjusted_max_replicas(self) -> int:
        """Never more."""

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Any]]] | None:
        """Name -> replica -> points with `timestamp` and `value`, oldest first."""

    @property
    def total_num_requests(self) -> float:
        """In replicas and waiting for one."""

    @property
    def total_queued_requests(self) -> float:
        """Waiting for a replica."""


@dataclass(frozen=True)
class PoolFacts:
    """What settings say of a pool; the rest of `PoolState` changes."""

    name: str
    stage: Stage
    model: str
    kind: str
    kind_speed: float
    cost_per_hour: float
    start_s: float
    is_estimate: bool = False


class PoolWatch:
    """Makes the states of one pool, one after the other.

    Args:
        facts: Of the pool.
    """

    def __init__(self, facts: PoolFacts) -> None:
        self.facts = facts
        self._reported: dict[str, tuple[float, float]] = {}  # its time there, first seen here
        self._request_s: float | None = None

    def state(self, context: Context, now: float) -> PoolState:
        """Return how things stand.

        Args:
            context: Of the pool's deployment.
            now: Seconds, never going back.
        """
        replicas = self._replicas(context, now)
        self._reported = {
            each.id: self._reported[each.id] for each in replicas if each.id in self._reported
        }
        accepted = sum(each.accepted for each in replicas)
        accepted_s = sum(each.accepted_s for each in replicas)
        if accepted > 0 and accepted_s > 0:  # what its first request takes, a stage cannot know
            self._request_s = accepted_s / accepted
        facts = self.facts
        return PoolState(
            name=facts.name,
            stage=facts.stage,
            model=facts.model,
            kind=facts.kind,
            replicas=tuple(replicas),
            target=context.target_num_replicas,
            minimum=context.capacity_adjusted_min_replicas,
            maximum=context.capacity_adjusted_max_replicas,
            queued=context.total_queued_requests or 0.0,
            request_s=self._request_s,
            kind_speed=facts.kind_speed,
            is_estimate=facts.is_estimate,
            cost_per_hour=facts.cost_per_hour,
            start_s=facts.start_s,
        )

    def _replicas(self, context: Context, now: float) -> list[ReplicaState]:
        reports = _newest_reports(context.raw_metrics or {})
        found: list[ReplicaState] = []
        silent: list[int] = []
        for replica in context.running_replicas:
            name = str(replica.unique_id)
            told_at, numbers = reports.get(name, _NO_REPORT)
            before = self._reported.get(name)
            if before is None or before[0] != told_at:
                before = self._reported[name] = (told_at, now)
            age = now - before[1]
            if not numbers:
                silent.append(len(found))
                found.append(ReplicaState(id=name, age_s=age))
                continue
            found.append(from_numbers(name, numbers, age))
        return _with_requests_of_silent(found, silent, context)


_NO_REPORT: tuple[float, dict[str, float]] = (0.0, {})


def _newest_reports(
    series: Mapping[str, Mapping[Any, Sequence[Any]]],
) -> dict[str, tuple[float, dict[str, float]]]:
    """Return replica -> when it told its newest report, and the numbers; older ones are left out.

    Metric by metric, for thousands of replicas: hashing one of Serve's replica ids costs more than
    everything else here.
    """
    reports: dict[str, tuple[float, dict[str, float]]] = {}
    for replica, points in series.get(_DATES_REPORT, {}).items():
        if points:
            reports[replica.unique_id] = (points[-1].timestamp, {})
    for name in NUMBERS:
        for replica, points in series.get(name, {}).items():
            if not points:
                continue
            newest = points[-1]
            report = reports.get(replica.unique_id)
            if report is not None and newest.timestamp == report[0]:
                report[1][name] = newest.value
    return reports


def _with_requests_of_silent(
    replicas: list[ReplicaState], silent: Iterable[int], context: Context
) -> list[ReplicaState]:
    """Share out the requests that no replica told of among those that told nothing."""
    places = list(silent)
    if not places:
        return replicas
    held = (context.total_num_requests or 0.0) - (context.total_queued_requests or 0.0)
    untold = max(held - sum(each.requests for each in replicas), 0.0) / len(places)
    for place in places:
        replicas[place] = replace(replicas[place], requests=untold)
    return replicas
