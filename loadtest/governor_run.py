"""What a run of the governor's benchmark shows: figures of its phases, targets, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median
from typing import Any

from loadtest.trace_plot import Panel, draw_trace

WITHIN_C = 2.0
READ_S = 0.25
"""Between two samples."""
_SETTLED_WITHIN_S = 30.0
_MEAN_OVER_S = 10.0


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment."""

    seconds: float
    temperature_c: float | None
    memory_temperature_c: float | None
    power_w: float | None
    sm_clock_mhz: float | None
    reasons: int | None
    duty: float
    rows: int
    step_ms: float | None
    forwards: int
    row_steps: int


def judge(
    samples: Sequence[Sample], marks: Sequence[tuple[float, str]], target_c: float
) -> dict[str, Any]:
    """Return figures of each phase, and what the held one must show.

    Args:
        samples: In order.
        marks: When the phases began; `held` is the one to be judged, `free` before it the
            comparison, `lifted` after it.
        target_c: What the governor was told.
    """
    ends = [at for at, _ in marks[1:]] + [samples[-1].seconds + READ_S]
    by_phase = {
        name: [each for each in samples if at <= each.seconds < end]
        for (at, name), end in zip(marks, ends, strict=True)
    }
    held = by_phase["held"]
    settled_s = _settles(held, target_c)
    steady = [each for each in held if each.seconds - held[0].seconds >= (settled_s or 0.0)]
    speeds = {
        "free": _rows_a_second(_last_half(by_phase["free"])),
        "held": _rows_a_second(steady),
        "lifted": _rows_a_second(_last_half(by_phase["lifted"])),
    }
    lifted = by_phase["lifted"]
    back = next((each.seconds for each in lifted if each.duty == 1), None)
    means = [mean for _, mean in _means(steady)]
    return {
        "target_c": target_c,
        "settled_after_s": settled_s,
        "ten_second_means_c": [round(min(means), 2), round(max(means), 2)] if means else None,
        "peak_held_c": max(each.temperature_c or 0.0 for each in held),
        "rows_a_second": {name: round(speed, 3) for name, speed in speeds.items()},
        "throughput_given_up": round(1 - speeds["held"] / speeds["free"], 4),
        "mean_duty_held": round(fmean(each.duty for each in steady), 4),
        "full_speed_after_s": None if back is None else round(back - lifted[0].seconds, 2),
        "lifted_to_free": round(speeds["lifted"] / speeds["free"], 4),
        "phases": {name: _figures(part) for name, part in by_phase.items()},
        "targets": {
            "settles_s": _target(settled_s, _SETTLED_WITHIN_S),
            "furthest_mean_c": _target(
                max((abs(mean - target_c) for mean in means), default=None), WITHIN_C
            ),
            "full_speed_again": {
                "at_least": 0.97,
                "is": round(speeds["lifted"] / speeds["free"], 4),
                "met": speeds["lifted"] >= 0.97 * speeds["free"],
            },
        },
    }


def _target(value: float | None, at_most: float) -> dict[str, Any]:
    return {"at_most": at_most, "is": value, "met": value is not None and value <= at_most}


def _settles(held: Sequence[Sample], target_c: float) -> float | None:
    """Return after how long every ten-second mean lies within `WITHIN_C`."""
    after: float | None = None
    for at, mean in reversed(_means(held)):
        if abs(mean - target_c) > WITHIN_C:
            break
        after = at
    return None if after is None else round(after - held[0].seconds, 2)


def _means(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """Return (since when, mean temperature over the next ten seconds)."""
    means = []
    for first in samples:
        window = [
            each.temperature_c
            for each in samples
            if 0 <= each.seconds - first.seconds < _MEAN_OVER_S and each.temperature_c is not None
        ]
        if samples[-1].seconds - first.seconds >= _MEAN_OVER_S - 2 * READ_S and window:
            means.append((first.seconds, fmean(window)))
    return means


def _last_half(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[len(samples) // 2 :]


def _rows_a_second(samples: Sequence[Sample]) -> float:
    first, last = samples[0], samples[-1]
    return (last.row_steps - first.row_steps) / max(last.seconds - first.seconds, 1e-9)


def _figures(samples: Sequence[Sample]) -> dict[str, Any]:
    def middle(name: str) -> float | None:
        values = [getattr(each, name) for each in samples]
        known = [value for value in values if value is not None]
        return round(median(known), 3) if known else None

    names = [field.name for field in fields(Sample) if field.name not in ("seconds", "row_steps")]
    return {"seconds": round(samples[-1].seconds - samples[0].seconds, 1)} | {
        f"median_{name}": middle(name) for name in names if name not in ("forwards", "reasons")
    }


def plot(samples: Sequence[Sample], marks: Sequence[tuple[float, str]], target_c: float) -> Any:
    """Return a picture of temperature, duty, rows and step time."""
    return draw_trace(
        [each.seconds for each in samples],
        [
            Panel(
                "C",
                {
                    "GPU": [each.temperature_c for each in samples],
                    "memory": [each.memory_temperature_c for each in samples],
                },
                [(target_c, f"target {target_c:.0f}")],
            ),
            Panel("duty", {"duty": [each.duty for each in samples]}, [(0.0, ""), (1.0, "")]),
            Panel("W", {"power": [each.power_w for each in samples]}),
            Panel("rows a forward", {"rows": [float(each.rows) for each in samples]}, [(0.0, "")]),
            Panel("ms a forward", {"step": [each.step_ms for each in samples]}),
        ],
        marks,
    )
