"""What Kelvin has to reach in the comparison, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.simulation.equal_service import MOST_HOURS

HOT = ("failed-cooling", "hot-aisle")
_LEAST_ATTAINMENT = 0.95
_MOST_THROTTLED = 0.10  # of queue-only's

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
        attained = policies["kelvin"]["slo_attainment"]["mean"]
        if name in HOT:
            found[f"{name}: slo attainment"] = _at_least(_LEAST_ATTAINMENT, attained)
        for rival, figures in differences[name].items():
            less = figures["slo_attainment"]
            half = less["half_of_95_percent_interval"] or 0.0
            if name in HOT:
                found[f"{name}: slo attainment above {rival}'s"] = {
                    "above": 0.0,
                    "is": less["mean"],
                    "interval": half,
                    "met": less["mean"] > 0,
                }
            else:
                found[f"{name}: slo attainment not below {rival}'s beyond the interval"] = {
                    "at_least": 0.0,
                    "is": round(less["mean"] + half, 5),
                    "met": less["mean"] + half >= 0,
                }
        found |= _against_queue_only(name, policies, equal.get(name))
    return found


def _against_queue_only(
    name: str, policies: Mapping[str, Any], equal: Mapping[str, Any] | None
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    theirs, ours = policies["queue-only"], policies["kelvin"]
    throttled = theirs["throttled_gpu_s"]["mean"]
    if throttled > 0:
        share = round(ours["throttled_gpu_s"]["mean"] / throttled, 4)
        found[f"{name}: throttled time of queue-only's"] = _at_most(_MOST_THROTTLED, share)
    if equal is None:
        return found
    hours = f"{name}: GPU-hours of queue-only's at equal attainment"
    row = equal["queue-only"]["fewest_gpu_hours_as_good"]
    if row is None:
        words = "no setting of queue-only attains as much"
        found[hours] = {"at_most": MOST_HOURS, "is": None, "met": True, "why": words}
    else:
        ratio = round(equal["kelvin"]["gpu_hours"] / row["gpu_hours"], 4)
        found[hours] = _at_most(MOST_HOURS, ratio)
    return found


def _at_least(bound: float, value: float) -> dict[str, Any]:
    return {"at_least": bound, "is": value, "met": value >= bound}


def _at_most(bound: float, value: float) -> dict[str, Any]:
    return {"at_most": bound, "is": value, "met": value <= bound}
