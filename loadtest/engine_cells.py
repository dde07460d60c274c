"""The cells of the engine benchmark: every arm serves the same arrivals under the virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from deployments.step_costs import StepCosts
from loadtest.arrivals import Arrival, Mix, draw
from loadtest.latencies import Latencies, Served, summary
from loadtest.rivals import serve_batches
from loadtest.virtual_clock import serve_steps

KELVIN, FIFO = "kelvin", "one at a time"
BATCH_SIZES = (2, 4, 8, 16)
LOADS = (0.5, 0.7, 0.9)
LEAST_THROUGHPUT = 0.97  # of the best rival's
MOST_P95 = 1.03  # of the best rival's
_AT_ONCE = 400  # requests there at time 0, to find saturation

Arm = Callable[[Sequence[Arrival], StepCosts], Served]


def _batches(size: int) -> Arm:
    return lambda arrivals, costs: serve_batches(arrivals, costs, size)


ARMS: dict[str, Arm] = {
    KELVIN: serve_steps,
    FIFO: _batches(1),
    **{f"batches of {size}": _batches(size) for size in BATCH_SIZES},
}


def saturated(model: str, mix: Mix, costs: StepCosts, seed: int = 0) -> dict[str, Any]:
    """Serve requests that are all there at time 0.

    Returns:
        Each arm's figures, the best rival, and the best throughput of all arms in `rate`.
    """
    arrivals = draw(mix, _AT_ONCE, None, seed)
    arms = {name: summary([arm(arrivals, costs)], costs) for name, arm in ARMS.items()}
    best = max((name for name in arms if name != KELVIN), key=lambda name: arms[name].throughput)
    ratio = arms[KELVIN].throughput / arms[best].throughput
    return {
        "model": model,
        "mix": mix.name,
        "rate": max(figures.throughput for figures in arms.values()),
        "arms": _as_json(arms),
        "best_rival": best,
        "throughput_ratio": round(ratio, 4),
        "met": ratio >= LEAST_THROUGHPUT,
    }


def cell(
    model: str,
    mix: Mix,
    costs: StepCosts,
    load: float,
    saturation: float,
    number: int,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Serve Poisson arrivals.

    Args:
        model: Its name, for the report.
        mix: What requests ask for.
        costs: Of the model.
        load: Offered, as a share of saturation.
        saturation: Requests a second.
        number: Of requests a seed.
        seeds: One run each; percentiles are taken over all their requests together.

    Returns:
        Each arm's figures, and the rival with the least p95.
    """
    offered = [draw(mix, number, load * saturation, seed) for seed in seeds]
    arms = {
        name: summary([arm(arrivals, costs) for arrivals in offered], costs)
        for name, arm in ARMS.items()
    }
    best = min((name for name in arms if name != KELVIN), key=lambda name: arms[name].p95)
    own, rival = arms[KELVIN], arms[best]
    return {
        "model": model,
        "mix": mix.name,
        "load": load,
        "offered_rate": round(load * saturation, 4),
        "arms": _as_json(arms),
        "best_rival": best,
        "p95_ratio": round(own.p95 / rival.p95, 4),
        "p50_ratio": round(own.p50 / rival.p50, 4),
        "slowdown_p95": [round(own.slowdown_p95, 2), round(rival.slowdown_p95, 2)],
        "met": own.p95 <= MOST_P95 * rival.p95,
    }


def _as_json(arms: dict[str, Latencies]) -> dict[str, Any]:
    return {
        name: {field: round(value, 4) for field, value in asdict(figures).items()}
        for name, figures in arms.items()
    }
