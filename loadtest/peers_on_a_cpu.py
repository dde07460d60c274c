"""Kelvin and its peers on this machine's cores: the built-in model behind HTTP, the same arrivals.

All arms are up all the time, each in processes of its own, and take turns under load, the order
reversed from one turn to the next: a machine that others slow down meets all of them alike. What
an idle arm takes of the cores is every arm's burden.
"""

from __future__ import annotations

import io
import os
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deployments.builtin.dequantise import dequantized_directory
from loadtest.lateness import measure as measure_generator
from loadtest.open_loop import poisson
from loadtest.peer_callers import Job, Served, offer, one_after_the_other
from loadtest.peer_dtype import faster_of, product_ms
from loadtest.peer_figures import AloneCosts, figures, targets_of
from loadtest.peer_servers import server
from loadtest.results import Results
from loadtest.trials import Judges, Trial, held_out_prompts, summarise
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir

LOADS = (0.5, 0.8, 1.2)
MIXED_STEPS = (4, 8, 12, 20, 30)
_AT_ONCE = 6  # pictures, for saturation
_SIDE = 256


@dataclass(frozen=True)
class Plan:
    """How long is measured, and with what.

    Attributes:
        arms: Names of `peer_servers.SERVERS`.
        loads: Of the best peer's saturation.
        mixes: `equal`, `mixed`.
        rounds: Turns of each arm under each load.
        seconds: Of arrivals in each turn.
        steps: Of equal jobs.
    """

    arms: tuple[str, ...]
    loads: tuple[float, ...]
    mixes: tuple[str, ...]
    rounds: int
    seconds: float
    steps: int


class Jobs:
    """Gives out jobs, no prompt twice: the same ones to every arm."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._examples = [example for _, example in held_out_prompts(1500, 9, _SIDE, _SIDE)]
        self._given = 0

    def take(self, number: int, mix: str, seed: str) -> list[Job]:
        """Return so many; `mixed` ones have 4 to 30 steps."""
        draw = random.Random(f"steps {seed}")
        jobs = []
        for _ in range(number):
            example = self._examples[self._given % len(self._examples)]
            steps = self._steps if mix == "equal" else draw.choice(MIXED_STEPS)
            jobs.append(Job(example, steps, self._given))
            self._given += 1
        return jobs

    def of(self, steps: Sequence[int]) -> list[Job]:
        """Return one of each number of steps."""
        return [
            Job(job.example, count, job.seed)
            for job, count in zip(self.take(len(steps), "equal", ""), steps, strict=True)
        ]


def measure(plan: Plan, folder: Path, results: Results) -> None:
    """Start the arms, find the best peer's saturation, and offer shares of it to each in turn.

    Everything is kept as it comes. An arm that does not come up says why and is left out.

    Args:
        plan: What is measured.
        folder: For the plain weights and the arms' logs.
        results: Where figures go.
    """
    results.keep(load_average_before=os.getloadavg(), generator_alone=measure_generator())
    model = resolve_model_dir(ModelSettings(path="builtin"))
    took = product_ms()
    dtype = faster_of(took)
    results.keep(
        peers_compute_in=str(dtype),
        product_ms={str(each): round(ms, 3) for each, ms in took.items()},
    )
    plain = dequantized_directory(model, folder / "plain", dtype)
    every: dict[str, list[Served]] = {}
    with ExitStack() as running:
        urls: dict[str, str] = {}
        for name in plan.arms:
            try:
                log = folder / f"{name}.log"
                urls[name] = running.enter_context(server(name, plain, log)).url
            except RuntimeError as error:
                results.keep_part("not_up", name, str(error))
        jobs = Jobs(plan.steps)
        costs, rate = _saturation(plan, urls, jobs, results)
        if rate:
            every = _loads(plan, urls, jobs, costs, rate, results)
        results.keep(load_average_after=os.getloadavg())
    for name, served in every.items():
        results.keep_part("adherence", name, _adherence(served))


def _saturation(
    plan: Plan, urls: dict[str, str], jobs: Jobs, results: Results
) -> tuple[AloneCosts, float]:
    """Warm up alike; return what the best peer takes for a picture alone, and its pictures/s."""
    alone, most = jobs.of((plan.steps, min(MIXED_STEPS), max(MIXED_STEPS), plan.steps)), 0.0
    warm, together = jobs.of((2, plan.steps)), jobs.take(_AT_ONCE, "equal", "")
    best: dict[int, float] = {}
    for name, url in urls.items():
        one_after_the_other(name, url, warm)
        took: dict[int, list[float]] = {}
        for served in one_after_the_other(name, url, alone):
            took.setdefault(served.job.steps, []).append(served.seconds)
        alone_s = {steps: min(each) for steps, each in took.items()}
        served_together = offer(name, url, together, [0.0] * len(together))
        failed = sorted({each.failure for each in served_together if each.failure})
        per_s = len(together) / max(each.seconds for each in served_together) if not failed else 0.0
        found = {"alone_s": alone_s, "pictures_per_s": round(per_s, 4), "failures": failed}
        results.keep_part("saturation", name, found)
        if name != "kelvin" and per_s > most:
            most, best = per_s, alone_s
    if not best:
        return AloneCosts({1: 0.0, 2: 0.0}), 0.0
    return AloneCosts(best), most


def _loads(
    plan: Plan,
    urls: dict[str, str],
    jobs: Jobs,
    costs: AloneCosts,
    rate: float,
    results: Results,
) -> dict[str, list[Served]]:
    """Offer each load in turns; return all that each arm served."""
    mixed_s = statistics.fmean(costs.seconds(steps) for steps in MIXED_STEPS)
    rates = {"equal": rate, "mixed": rate * costs.seconds(plan.steps) / mixed_s}
    results.keep(best_peer_per_s={mix: round(each, 4) for mix, each in rates.items()})
    cells = [(mix, load) for mix in plan.mixes for load in plan.loads]
    kept: dict[tuple[str, float], dict[str, list[list[Served]]]] = {
        cell: {name: [] for name in urls} for cell in cells
    }
    for number in range(plan.rounds):
        for index, (mix, load) in enumerate(cells):
            seed = f"{mix} {load} {number}"
            times = poisson(load * rates[mix], 0.0, plan.seconds, seed)
            asked = jobs.take(len(times), mix, seed)
            for name in in_turn(list(urls), number, index):
                rounds = kept[mix, load][name]
                rounds.append(offer(name, urls[name], asked, times))
                label = f"{mix}, {round(100 * load)} %"
                results.report.setdefault("loads", {}).setdefault(label, {})
                results.report["loads"][label][name] = figures(rounds, costs)
                results.keep(targets=targets_of(results.report))
    return {
        name: [each for cell in cells for served in kept[cell][name] for each in served]
        for name in urls
    }


def in_turn(names: Sequence[str], turn: int, load: int) -> Sequence[str]:
    """Return the order of arms: the other way round from one turn of a load to the next.

    And from one load to the next, so that what drifts within a turn meets arms alike, too.
    """
    return names[::-1] if (turn + load) % 2 else names


def _adherence(served: Sequence[Served]) -> dict[str, Any]:
    """Judge what all pictures of an arm show."""
    came = [each for each in served if each.picture is not None]
    with Judges() as judges:
        for each in came:
            assert each.picture is not None
            with Image.open(io.BytesIO(each.picture)) as image:
                judges.submit(np.asarray(image.convert("RGB")), each.job.example.claims)
        verdicts = judges.verdicts()
    trials = [
        Trial("core", each.job.example, each.job.seed, verdict)
        for each, verdict in zip(came, verdicts, strict=True)
    ]
    found = summarise(trials).get("core", {"n": 0})
    return {name: found[name] for name in ("n", "all_right", "interval_95") if name in found}
