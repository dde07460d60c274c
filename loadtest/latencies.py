"""What a run of arrivals comes to: throughput, latencies, and how they compare with being alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deployments.step_costs import StepCosts
from loadtest.arrivals import Arrival


@dataclass(frozen=True)
class Latencies:
    """Of one or several runs together; seconds."""

    requests: int
    throughput: float  # requests a second, to the end of the last one
    p50: float
    p95: float
    p99: float
    slowest: float
    slowdown_p95: float  # latency / latency on an idle card
    rows_per_forward: float


@dataclass(frozen=True)
class Served:
    """The arrivals of one run and what became of them."""

    arrivals: Sequence[Arrival]
    finished_at: Mapping[int, float]  # by key
    forwards: int
    row_steps: int


def summary(runs: Sequence[Served], costs: StepCosts) -> Latencies:
    """Return the figures of several runs of the same kind together.

    Raises:
        ValueError: There is no request in them.
    """
    latencies, slowdowns, seconds = [], [], 0.0
    for run in runs:
        for arrival in run.arrivals:
            latency = run.finished_at[arrival.key] - arrival.at
            latencies.append(latency)
            slowdowns.append(latency / arrival.unloaded_s(costs))
        seconds += max(run.finished_at.values(), default=0.0)
    latencies.sort()
    slowdowns.sort()
    return Latencies(
        requests=len(latencies),
        throughput=len(latencies) / seconds if seconds else 0.0,
        p50=percentile(latencies, 0.50),
        p95=percentile(latencies, 0.95),
        p99=percentile(latencies, 0.99),
        slowest=latencies[-1],
        slowdown_p95=percentile(slowdowns, 0.95),
        rows_per_forward=sum(run.row_steps for run in runs) / sum(run.forwards for run in runs),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of sorted values that so large a share of them does not exceed.

    Raises:
        ValueError: There are none.
    """
    if not values:
        raise ValueError("no values, no percentile")
    return values[max(0, -int(-share * len(values) // 1) - 1)]
