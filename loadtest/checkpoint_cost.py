"""What checkpoints cost the denoiser: the same requests without any, and with one every few steps.

An engine denoises as many requests at a time as asked for, round after round, with each number of
steps between checkpoints in turn: so that a card that gets warm slows them all alike.
"""

from __future__ import annotations

import argparse
import queue
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch

from deployments.engine import Engine
from deployments.payloads import DenoiseJob, Latents, StepProgress
from deployments.sd3.mmdit import Mmdit
from deployments.step_costs import StepCosts
from loadtest import command_line
from loadtest.arrivals import Arrival, square
from loadtest.engine_replay import random_prompt, replay_job
from loadtest.record_step_costs import load_mmdit, record
from loadtest.results import STDERR, Results

_WAIT_S = 300.0


def measure(options: argparse.Namespace, results: Results) -> None:
    """Run all rounds."""
    mmdit = load_mmdit(options.model, torch.device(options.device), options.precision)
    costs = record(mmdit, (options.size,), (2, 2 * options.in_flight), 1.0, number=3)
    prompt = random_prompt(mmdit)
    jobs = [
        # With a history: the largest checkpoints there are.
        replace(
            replay_job(Arrival(number, 0.0, square(options.size), 2, options.steps), prompt),
            sampler="dpmpp_2m",
        )
        for number in range(options.in_flight)
    ]
    took: dict[int, list[float]] = {every: [] for every in (0, *options.every)}
    sizes: set[int] = set()
    for number in range(options.rounds + 1):
        for every, seconds in took.items():
            one = _round(mmdit, costs, jobs, every, sizes)
            if number:  # the first one warms up
                seconds.append(one)
    ms = {every: 1000 * median(seconds) / options.steps for every, seconds in took.items()}
    results.keep(
        ms_per_step={str(every): round(one, 4) for every, one in ms.items()},
        slower_percent={
            str(every): round(100 * (one / ms[0] - 1), 3) for every, one in ms.items() if every
        },
        largest_checkpoint_bytes=max(sizes, default=0),
    )


def _round(
    mmdit: Mmdit, costs: StepCosts, jobs: Sequence[DenoiseJob], every: int, sizes: set[int]
) -> float:
    """Return the seconds from the first request's coming to the last one's end."""
    engine = Engine(
        mmdit,
        max_waiting=len(jobs),
        costs=StepCosts.from_json(costs.as_json()),
        checkpoint_every=every,
    )
    ears: list[queue.Queue[Any]] = [queue.Queue() for _ in jobs]
    try:
        began = time.perf_counter()
        for job, ear in zip(jobs, ears, strict=True):
            engine.submit(job, ear.put)
        for ear in ears:
            while isinstance(event := ear.get(timeout=_WAIT_S), StepProgress):
                arrays = vars(event.checkpoint).values() if event.checkpoint else ()
                if arrays:
                    sizes.add(sum(each.nbytes for each in arrays if isinstance(each, np.ndarray)))
            if not isinstance(event, Latents):
                raise event
        return time.perf_counter() - began
    finally:
        engine.close()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.checkpoint_cost", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default="large", choices=("large", "medium", "tiny"))
    add("--size", type=command_line.side, default=1024, help="side of the pictures, pixels")
    add("--precision", default="auto")
    add("--in-flight", type=command_line.whole(1, 32), default=1, help="requests at a time")
    add("--steps", type=command_line.whole(2, 100), default=20)
    add("--every", type=command_line.whole(1, 100), nargs="+", default=[5, 1])
    add("--rounds", type=command_line.whole(1, 100), default=5)
    command_line.add_device_and_report(parser)
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    known = command_line.known_before(
        "loadtest.checkpoint_cost", options, "model", "size", "in_flight", "steps"
    )
    with Results(known, options.out, options.json) as results:
        measure(options, results)
    for every, percent in results.report["slower_percent"].items():
        STDERR.print(f"every {every}: {percent} % slower", markup=False, highlight=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
