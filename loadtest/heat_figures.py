"""What runs of the two arms of `loadtest.heat_bench` come to, and the ratio of their tails."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.latencies import percentile

QUEUE, KELVIN = "queue", "kelvin"


@dataclass(frozen=True)
class Answer:
    """What became of one arrival; seconds."""

    at: float
    latency: float
    replica: str | None  # that denoised it; None: it failed
    error: str | None = None


def figures(
    arm: str, answers: Sequence[Answer], hot: str | None, status: dict[str, Any]
) -> dict[str, Any]:
    """Return what one run of an arm came to."""
    latencies = sorted(answer.latency for answer in answers if answer.error is None)
    by_hot = sum(answer.replica == hot for answer in answers)
    return {
        "arm": arm,
        "requests": len(answers),
        "failed": [answer.error for answer in answers if answer.error is not None],
        **{f"p{part}": round(percentile(latencies, part / 100), 3) for part in (50, 95, 99)},
        "mean": round(statistics.fmean(latencies), 3),
        "share_of_the_slow_card": round(by_hot / len(answers), 3),
        "replicas_at_the_end": len(status["stages"]["denoise"]),
        "changes": [change["reason"] for change in status["autoscaling"]["changes"]],
        "latencies": [round(latency, 3) for latency in latencies],
    }


def compare(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return each arm over all its runs, and the ratio of the two p95."""
    arms: dict[str, Any] = {}
    for arm in (QUEUE, KELVIN):
        own = [run for run in runs if run["arm"] == arm]
        together = sorted(latency for run in own for latency in run["latencies"])
        arms[arm] = {
            "p50": percentile(together, 0.50),
            "p95": percentile(together, 0.95),
            "p95_of_runs": [run["p95"] for run in own],
            "failed": sum(len(run["failed"]) for run in own),
            "share_of_the_slow_card": [run["share_of_the_slow_card"] for run in own],
        }
    ratio = round(arms[KELVIN]["p95"] / arms[QUEUE]["p95"], 3)
    failed = sum(arm["failed"] for arm in arms.values())
    return {
        "arms": arms,
        "targets": {
            "p95_ratio": {"below": 1.0, "is": ratio, "met": ratio < 1.0},
            "failed": {"at_most": 0, "is": failed, "met": failed == 0},
        },
    }
