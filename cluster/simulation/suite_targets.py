"""What Kelvin has to reach in the comparison, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HOT = ("failed-cooling", "hot-aisle")
_LEAST_ATTAINMENT = 0.95
_MOST_THROTTLED = 0.10  # of queue-only's
_MOST_GPU_HOURS = 1.05  # of queue-only's, at equal attainment

Cells = Mapping[str, Mapping[Any, Mapping[str, Mapping[str, Any]]]]


def targets(cells: Cells, differences: Cells) -> dict[str, Any]:
    """Return every target with what was found.

    Args:
        cells: Scenario -> policy -> figure -> summary.
        differences: Scenario -> rival -> figure -> summary of Kelvin's minus the rival's.
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
        found |= _against_queue_only(name, policies, differences[name]["queue-only"])
    return found


def _against_queue_only(
    name: str, policies: Mapping[str, Any], less: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    theirs, ours = policies["queue-only"], policies["kelvin"]
    throttled = theirs["throttled_gpu_s"]["mean"]
    if throttled > 0:
        share = round(ours["throttled_gpu_s"]["mean"] / throttled, 4)
        found[f"{name}: throttled time of queue-only's"] = _at_most(_MOST_THROTTLED, share)
    hours = round(ours["gpu_hours"]["mean"] / theirs["gpu_hours"]["mean"], 4)
    gained = less["slo_attainment"]
    half = gained["half_of_95_percent_interval"] or 0.0
    held = _at_most(_MOST_GPU_HOURS, hours)
    # Where Kelvin serves more requests in time, the hours are not those of equal service.
    if gained["mean"] - half > 0 and not held["met"]:
        held["met"] = None
        held["why"] = "attainment is not equal: queue-only's best settings do not reach Kelvin's"
    found[f"{name}: GPU-hours of queue-only's"] = held
    return found


def _at_least(bound: float, value: float) -> dict[str, Any]:
    return {"at_least": bound, "is": value, "met": value >= bound}


def _at_most(bound: float, value: float) -> dict[str, Any]:
    return {"at_most": bound, "is": value, "met": value <= bound}
