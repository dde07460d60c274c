"""What Kelvin has to reach in the comparison, and whether it does.

Verdicts are of the figures seed by seed: means and intervals that are shown are rounded, and a sum
of two of them may be 0 where what it stands for is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.simulation.equal_service import MOST_HOURS
from cluster.simulation.intervals import mean_and_half

HOT = ("failed-cooling", "hot-aisle")
_LEAST_ATTAINMENT = 0.95
_MOST_THROTTLED = 0.10  # of queue-only's
_DIGITS = 6
_NOTHING = 1e-9  # what sums of floats are off by

Cells = Mapping[str, Mapping[Any, Mapping[str, Mapping[str, Any]]]]


def targets(
    cells: Cells, differences: Cells, equal: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, Any]:
    """Return every target with what was found.

    Args:
        cells: Scenario -> policy -> figure -> summary.
        differences: Scenario -> rival -> figure -> summary of Kelvin's minus the rival's.
        equal: Scenario -> what `equal_service` found.
    """
    found: dict[str, Any] = {}
    for name, policies in cells.items():
        attained = _mean(policies["kelvin"]["slo_attainment"])
        if name in HOT:
            found[f"{name}: slo attainment"] = _at_least(_LEAST_ATTAINMENT, attained)
        for rival, figures in differences[name].items():
            less, half = mean_and_half(figures["slo_attainment"]["by_seed"])
            most = less + (half or 0.0)
            if name in HOT:
                found[f"{name}: slo attainment above {rival}'s"] = {
                    "above": 0.0,
                    "is": round(less, _DIGITS),
                    "interval": round(half or 0.0, _DIGITS),
                    "met": less > _NOTHING,
                }
            else:
                key = f"{name}: slo attainment not below {rival}'s beyond the interval"
                found[key] = _at_least(0.0, most)
        found |= _against_queue_only(name, policies, equal.get(name))
    return found


def _against_queue_only(
    name: str, policies: Mapping[str, Any], equal: Mapping[str, Any] | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    theirs, ours = policies["queue-only"], policies["kelvin"]
    throttled = _mean(theirs["throttled_gpu_s"])
    if throttled > 0:
        share = _mean(ours["throttled_gpu_s"]) / throttled
        found[f"{name}: throttled time of queue-only's"] = _at_most(_MOST_THROTTLED, share)
    if equal is None:
        return found
    hours = f"{name}: GPU-hours of queue-only's at equal attainment"
    row = equal["queue-only"]["fewest_gpu_hours_as_good"]
    if row is None:
        words = "no setting of queue-only attains as much"
        found[hours] = {"at_most": MOST_HOURS, "is": None, "met": True, "why": words}
    else:
        ratio = equal["kelvin"]["gpu_hours"] / row["gpu_hours"]
        found[hours] = _at_most(MOST_HOURS, ratio)
    return found


def _mean(figure: Mapping[str, Any]) -> float:
    mean, _ = mean_and_half(figure["by_seed"])
    return mean


def _at_least(bound: float, value: float) -> dict[str, Any]:
    return {"at_least": bound, "is": round(value, _DIGITS), "met": value >= bound - _NOTHING}


def _at_most(bound: float, value: float) -> dict[str, Any]:
    return {"at_most": bound, "is": round(value, _DIGITS), "met": value <= bound + _NOTHING}
