"""The governor on a real card: SD3.5's denoiser at saturation, held to a temperature, then let go.

The real engine makes real forwards without a pause while temperature, duty, rows and step time are
noted. Random weights: what they are decides neither speed nor heat.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean, median
from typing import Any

import torch

from cluster.governor import FREE, Allowance, GovernorSettings
from cluster.thermal import HeatSource, Reading
from deployments.engine import Engine
from deployments.governed_heat import GovernedHeat
from deployments.heat_watch import HeatWatch
from deployments.payloads import Latents, StepProgress
from deployments.sd3.mmdit import Mmdit
from deployments.step_costs import StepCosts
from loadtest import command_line
from loadtest.arrivals import Arrival, square
from loadtest.engine_replay import random_prompt, replay_job
from loadtest.results import STDERR, Results
from loadtest.trace_plot import Panel, draw_trace

WITHIN_C = 2.0
_SETTLED_WITHIN_S = 30.0
_READ_S = 0.25
_MEAN_OVER_S = 10.0
_STEPS = 28


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


@dataclass(frozen=True)
class Phase:
    """A part of the run: its name, its length, and what the governor is told."""

    name: str
    seconds: float
    settings: GovernorSettings | None  # None: no governor


class Bench:
    """Keeps an engine saturated and samples it.

    Args:
        mmdit: Warmed at the size to be asked for.
        costs: Of its forwards, measured cool.
        source: Of the card's heat.
        side: Of the pictures, pixels.
        in_flight: Requests at any time, each of two rows.
    """

    def __init__(
        self, mmdit: Mmdit, costs: StepCosts, source: HeatSource, side: int, in_flight: int
    ) -> None:
        self._watch = HeatWatch(source, _READ_S)
        self._governor: Callable[[], Allowance] = lambda: FREE
        self._engine = Engine(
            mmdit, max_waiting=2 * in_flight, costs=costs, governor=lambda: self._governor()
        )
        self._prompt = random_prompt(mmdit)
        self._side, self._in_flight = side, in_flight
        self._number = 0
        self._row_steps = 0
        self._closing = threading.Event()
        self.failed: list[BaseException] = []

    def run(self, phases: Sequence[Phase]) -> tuple[list[Sample], list[tuple[float, str]]]:
        """Go through the phases; the first one named `idle` makes no forwards.

        Returns:
            Samples, and when each phase began.
        """
        samples: list[Sample] = []
        marks: list[tuple[float, str]] = []
        began = time.monotonic()
        try:
            for phase in phases:
                marks.append((time.monotonic() - began, phase.name))
                self._governor = self._governor_of(phase.settings)
                if phase.name != "idle" and not self._number:
                    for _ in range(self._in_flight):
                        self._send()
                until = time.monotonic() + phase.seconds
                while time.monotonic() < until:
                    if self.failed:
                        raise self.failed[0]
                    samples.append(self._sample(time.monotonic() - began))
                    time.sleep(_READ_S)
        finally:
            self._closing.set()
            self._engine.close()
            self._watch.close()
        return samples, marks

    def _governor_of(self, settings: GovernorSettings | None) -> Callable[[], Allowance]:
        return (lambda: FREE) if settings is None else GovernedHeat(self._watch, settings)

    def _send(self) -> None:
        self._number += 1
        arrival = Arrival(self._number, 0.0, square(self._side), 2, _STEPS)
        self._engine.submit(replay_job(arrival, self._prompt), self._heard)

    def _heard(self, event: StepProgress | Latents | BaseException) -> None:
        if isinstance(event, StepProgress):
            self._row_steps += 2
        elif isinstance(event, Latents):
            self._send()
        elif not self._closing.is_set():
            self.failed.append(event)

    def _sample(self, at: float) -> Sample:
        reading, stats = self._watch.newest or Reading(at=0.0), self._engine.stats()
        return Sample(
            seconds=round(at, 3),
            temperature_c=reading.temperature_c,
            memory_temperature_c=reading.memory_temperature_c,
            power_w=reading.power_w,
            sm_clock_mhz=reading.sm_clock_mhz,
            reasons=reading.clocks_event_reasons,
            duty=round(self._engine.allowance.duty, 4),
            rows=stats.last_rows,
            step_ms=stats.last_forward_ms,
            forwards=stats.forwards,
            row_steps=self._row_steps,
        )


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
    ends = [at for at, _ in marks[1:]] + [samples[-1].seconds + _READ_S]
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
        if samples[-1].seconds - first.seconds >= _MEAN_OVER_S - 2 * _READ_S and window:
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


def measure(options: argparse.Namespace, results: Results) -> None:
    """Run it on the card."""
    from cluster.thermal import open_source
    from deployments.card_uuid import card_uuid
    from loadtest.record_step_costs import load_mmdit, record
    from serve.config import ThermalSettings

    device = torch.device(options.device)
    source = open_source(card_uuid(device), ThermalSettings())
    if source is None:
        raise SystemExit("this card cannot be read: there is no heat to govern")
    mmdit = load_mmdit(options.model, device, options.precision)
    costs = record(mmdit, (options.size,), (2, 4), 2.0, number=5)
    results.keep(cool_ms={"2 rows": costs.seconds(square(options.size), 2) * 1000})
    _wait_until_cool(source, options.cool_s)
    first = source.read()
    if first is None or first.temperature_c is None:
        raise SystemExit("this card does not tell its temperature")
    target = first.temperature_c + options.above_idle
    results.keep(idle_c=first.temperature_c)
    bench = Bench(mmdit, costs, source, options.size, options.in_flight)
    samples, marks = bench.run(
        [
            Phase("idle", 4.0, None),
            Phase("free", options.free_s, None),
            Phase("held", options.held_s, GovernorSettings(target_c=target)),
            Phase("lifted", options.lifted_s, None),
        ]
    )
    figures = judge(samples, marks, target)
    results.keep(**figures)
    results.report["phases_began"] = marks
    results.report["samples"] = [asdict(each) for each in samples]
    if options.plot:
        plot(samples, marks, target).save(options.plot)


def _wait_until_cool(source: HeatSource, at_most_s: float) -> None:
    """Wait until an idle card has stopped cooling."""
    ends, last = time.monotonic() + at_most_s, float("inf")
    while time.monotonic() < ends:
        reading = source.read()
        now = None if reading is None else reading.temperature_c
        if now is None or now >= last:
            return
        last = now
        time.sleep(4.0)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.governor_bench", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default="large", choices=("large", "medium", "tiny"))
    add("--size", type=command_line.side, default=1024, help="side of the pictures, pixels")
    add("--precision", default="auto")
    add("--device", type=command_line.device, default="cuda")
    add("--above-idle", type=float, default=16.0, help="target, degrees C above the idle card")
    add("--in-flight", type=command_line.whole(1, 64), default=4, help="requests at any time")
    add("--cool-s", type=command_line.seconds, default=30.0, help="longest wait before")
    add("--free-s", type=command_line.seconds, default=20.0)
    add("--held-s", type=command_line.seconds, default=60.0)
    add("--lifted-s", type=command_line.seconds, default=15.0)
    add("--plot", type=command_line.file_to_write, help="PNG of the run")
    add("--out", type=command_line.file_to_write, help="file for the JSON, written as it grows")
    add("--json", action="store_true", help="JSON on standard output")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    known = command_line.known_before(
        "loadtest.governor_bench", options, "model", "size", "in_flight", "above_idle"
    )
    with Results(known, options.out, options.json) as results:
        measure(options, results)
    for name, target in results.report["targets"].items():
        STDERR.print(f"{name}: {'met' if target['met'] else 'missed'} {target}", markup=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; exit 0 whether or not the targets are met."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


if __name__ == "__main__":
    sys.exit(main())
