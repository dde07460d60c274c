"""What the comparison on a CPU comes to: by load and mix, each arm, and Kelvin against the best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.latencies import percentile
from loadtest.lateness import lateness_of
from loadtest.peer_callers import Served

SLO_TIMES = 3.0
"""A picture is in time within so many times what the best peer takes for it alone."""
LEAST_THROUGHPUT = 0.95  # of the best peer's
MOST_P95_EQUAL = 1.03  # times the best peer's
MOST_P95_MIXED = 0.90  # clearly better
_LATE_SHARE = 0.5  # arms of which less than this arrived have no percentiles to compare


class AloneCosts:
    """Seconds that a picture takes alone, linear in its steps.

    Args:
        alone_s: Measured, by number of steps; two at least.
    """

    def __init__(self, alone_s: Mapping[int, float]) -> None:
        few, many = min(alone_s), max(alone_s)
        self._few, self._few_s = few, alone_s[few]
        self._a_step_s = max(alone_s[many] - alone_s[few], 0.0) / (many - few)

    def seconds(self, steps: int) -> float:
        """Return them for a number of steps."""
        return self._few_s + (steps - self._few) * self._a_step_s


def figures(rounds: Sequence[Sequence[Served]], costs: AloneCosts) -> dict[str, Any]:
    """Return one arm's figures under one load.

    Args:
        rounds: The same kind of arrivals over again.
        costs: Of the best peer, by which all are judged.
    """
    every = [served for each in rounds for served in each]
    came = sorted(served.seconds for served in every if served.picture is not None)
    in_time = sum(
        served.picture is not None and served.seconds <= SLO_TIMES * costs.seconds(served.job.steps)
        for served in every
    )
    found: dict[str, Any] = {
        "requests": len(every),
        "failed": sum(served.picture is None for served in every),
        "failures": sorted({served.failure[:160] for served in every if served.failure}),
        "pictures_per_s": _spread([_throughput(each) for each in rounds if each]),
        "in_time": in_time / len(every) if every else None,
        "generator": lateness_of([served.late_s for served in every]),
    }
    if len(came) >= _LATE_SHARE * len(every) and came:
        found |= {f"p{share}_s": round(percentile(came, share / 100), 3) for share in (50, 95, 99)}
        found["p95_s_by_round"] = [_p95(each) for each in rounds]
    return found


def _throughput(served: Sequence[Served]) -> float:
    done = [each.at + each.seconds for each in served if each.picture is not None]
    return len(done) / (max(done) - min(each.at for each in served)) if done else 0.0


def _p95(served: Sequence[Served]) -> float | None:
    came = sorted(each.seconds for each in served if each.picture is not None)
    return round(percentile(came, 0.95), 3) if came else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
        "n": len(values),
    }


def targets_of(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Judge each load and mix that Kelvin and a peer were measured under."""
    targets: dict[str, dict[str, Any]] = {}
    for name, arms in report.get("loads", {}).items():
        ours = arms.get("kelvin")
        peers = [arm for other, arm in arms.items() if other != "kelvin" and arm["pictures_per_s"]]
        if not ours or not peers or not ours["pictures_per_s"]:
            continue
        best = max(arm["pictures_per_s"]["median"] for arm in peers)
        if best:
            ratio = ours["pictures_per_s"]["median"] / best
            targets[f"{name}, pictures/s over the best peer's"] = {
                "at_least": LEAST_THROUGHPUT,
                "is": round(ratio, 3),
                "met": ratio >= LEAST_THROUGHPUT,
            }
        if p95s := [arm["p95_s"] for arm in peers if "p95_s" in arm]:
            most = MOST_P95_EQUAL if name.startswith("equal") else MOST_P95_MIXED
            # Of too few pictures there is no p95, and that is no success.
            found = round(ours["p95_s"] / min(p95s), 3) if "p95_s" in ours else None
            targets[f"{name}, p95 over the best peer's"] = {
                "at_most": most,
                "is": found,
                "met": found is not None and found <= most,
            }
        # Percentiles are of what came: who loses requests could win by them.
        fewest = min(arm["failed"] for arm in peers)
        targets[f"{name}, failed"] = {
            "at_most": fewest,
            "is": ours["failed"],
            "met": ours["failed"] <= fewest,
        }
    return targets
