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
from dataclasses import asdict, dataclass

import torch

from cluster.governor import FREE, Allowance, GovernorSettings
from cluster.thermal import HeatSource, Reading
from deployments.engine import Engine
from deployments.governed_heat import GovernedHeat
from deployments.heat_watch import HeatWatch
from deployments.payloads import DenoiseEvent, Latents, StepProgress
from deployments.sd3.mmdit import Mmdit
from deployments.step_costs import StepCosts
from loadtest import command_line
from loadtest.arrivals import Arrival, square
from loadtest.engine_replay import random_prompt, replay_job
from loadtest.governor_run import READ_S, Sample, judge, plot
from loadtest.results import STDERR, Results

_STEPS = 28


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
        self._watch = HeatWatch(source, READ_S)
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
                    time.sleep(READ_S)
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

    def _heard(self, event: DenoiseEvent | BaseException) -> None:
        if isinstance(event, StepProgress):
            self._row_steps += 2
        elif isinstance(event, Latents):
            self._send()
        elif isinstance(event, BaseException) and not self._closing.is_set():
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
