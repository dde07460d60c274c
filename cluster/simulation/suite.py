"""The comparison: scenarios x policies x seeds over processes, figures with intervals, targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from cluster.simulation.equal_service import equal_service
from cluster.simulation.intervals import paired, summary
from cluster.simulation.policies import POLICIES, RIVALS, Policy, policy
from cluster.simulation.scenario import HELD_OUT_SEEDS, Scenario, load_scenario
from cluster.simulation.suite_targets import targets
from cluster.simulation.world import World

FIGURES = (
    *("slo_attainment", "p50_s", "p95_s", "p99_s", "throttled_gpu_s", "peak_temperature_c"),
    *("gpu_hours", "cost", "joules_per_image", "unfinished", "restarts"),
)

Job = tuple[str, Policy, int]
Told = Callable[[int, int, Job], None]


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Run one policy on one shipped scenario or file with one seed; return its figures."""
    name, chosen, seed = job
    return job, World(load_scenario(name), chosen.control, seed).run().figures


def run_jobs(
    jobs: Sequence[Job], processes: int, told: Told | None = None
) -> dict[Job, dict[str, Any]]:
    """Run jobs over processes; `told` hears of each that is done."""
    found: dict[Job, dict[str, Any]] = {}
    # The long ones first, so that no process is left with one at the end.
    ordered = sorted(jobs, key=lambda job: not job[1].name.startswith("kelvin"))
    with ProcessPoolExecutor(max_workers=processes) as pool:
        for done in as_completed([pool.submit(run_job, job) for job in ordered]):
            job, figures = done.result()
            found[job] = figures
            if told is not None:
                told(len(found), len(jobs), job)
    return found


def run_suite(
    names: Sequence[str],
    seeds: int | None,
    processes: int,
    told: Told | None = None,
    held_out: bool = False,
) -> dict[str, Any]:
    """Compare all policies on scenarios.

    Args:
        names: Of scenarios, or files.
        seeds: How many of each scenario's seeds; None: all.
        processes: At a time.
        told: Hears of progress.
        held_out: With seeds that no setting was chosen by, instead of the scenarios' own.

    Returns:
        `cells` by scenario and policy, `differences` of Kelvin from each rival, `equal_service` on
        the tuning seeds (only with all of the scenarios' own seeds), and `targets`.

    Raises:
        ConfigurationError: A scenario or the rivals' settings cannot be read.
    """
    scenarios = {name: load_scenario(name) for name in names}
    chosen = {name: {each: policy(each, name) for each in POLICIES} for name in names}
    of = {
        name: (HELD_OUT_SEEDS if held_out else scenario.seeds)[:seeds]
        for name, scenario in scenarios.items()
    }
    jobs = [
        (name, chosen[name][each], seed) for name in names for each in POLICIES for seed in of[name]
    ]
    whole = seeds is None and not held_out
    tuned = {name: (scenarios[name].tuning_seeds if whole else ()) for name in names}
    jobs += [(name, Policy("kelvin"), seed) for name in names for seed in tuned[name]]
    found = run_jobs(jobs, processes, told)
    equal = {
        name: equal_service(name, [found[name, Policy("kelvin"), seed] for seed in tuned[name]])
        for name in names
    }

    def values(name: str, each: Any, figure: str) -> list[float]:
        return [float(found[name, chosen[name][each], seed][figure]) for seed in of[name]]

    cells = {
        name: {
            each: {figure: summary(values(name, each, figure)) for figure in FIGURES}
            for each in POLICIES
        }
        for name in names
    }
    differences = {
        name: {
            rival: {
                figure: paired(values(name, "kelvin", figure), values(name, rival, figure))
                for figure in FIGURES
            }
            for rival in RIVALS
        }
        for name in names
    }
    return {
        "scenarios": {name: _described(scenarios[name], of[name]) for name in names},
        "settings": {
            name: {
                each: None if one.settings is None else asdict(one.settings)
                for each, one in chosen[name].items()
            }
            for name in names
        },
        "cells": cells,
        "differences": differences,
        "equal_service": equal,
        "targets": targets(cells, differences, equal),
    }


def _described(scenario: Scenario, seeds: Sequence[int]) -> dict[str, Any]:
    return {
        "description": " ".join(scenario.description.split()),
        "seeds": list(seeds),
        "slo": f"latency at most {scenario.slo_factor:g} times that of an idle cluster of "
        f"{scenario.reference_kind}",
        "minutes": round(scenario.duration_s / 60, 1),
    }
