"""The rivals' best settings: a grid for each scenario, on seeds that the comparison does not use.

Whatever attains most requests in time wins; among settings within half a per cent of that, the one
with the fewest GPU-hours. Each rival so gets settings for each scenario; Kelvin has one set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from statistics import fmean
from typing import Any

from cluster.simulation.policies import Policy, PolicyName, RivalSettings
from cluster.simulation.queue_only import QueueOnlySettings
from cluster.simulation.scenario import load_scenario
from cluster.simulation.suite import Job, Told, run_jobs
from cluster.simulation.threshold import ThresholdSettings

_AS_GOOD = 0.005

QUEUE_ONLY_GRID: tuple[QueueOnlySettings, ...] = tuple(
    QueueOnlySettings(target_ongoing_requests=target, upscale_delay_s=up, downscale_delay_s=down)
    for target, up, down in product((0.5, 0.7, 1.0, 1.5, 2.0), (0.0, 30.0), (120.0, 600.0))
)
THRESHOLD_GRID: tuple[ThresholdSettings, ...] = (
    *(
        ThresholdSettings("temperature", target)
        for target in (35.0, 40.0, 45.0, 50.0, 55.0, 60.0, 65.0)
    ),
    *(ThresholdSettings("utilisation", target) for target in (0.4, 0.55, 0.7, 0.85)),
)
_GRIDS: tuple[tuple[PolicyName, Sequence[RivalSettings]], ...] = (
    ("queue-only", QUEUE_ONLY_GRID),
    ("threshold", THRESHOLD_GRID),
)


def tune(names: Sequence[str], processes: int, told: Told | None = None) -> dict[str, Any]:
    """Try all settings of the rivals on the tuning seeds; return those chosen, and all figures.

    Raises:
        ConfigurationError: A scenario cannot be read.
    """
    seeds = {name: load_scenario(name).tuning_seeds for name in names}
    jobs: list[Job] = [
        (name, Policy(rival, settings), seed)
        for name in names
        for rival, grid in _GRIDS
        for settings in grid
        for seed in seeds[name]
    ]
    found = run_jobs(jobs, processes, told)
    chosen: dict[str, Any] = {}
    tried: dict[str, Any] = {}
    for name in names:
        for rival, grid in _GRIDS:
            rows: list[dict[str, Any]] = []
            for settings in grid:
                runs = [found[name, Policy(rival, settings), seed] for seed in seeds[name]]
                rows.append(
                    {
                        "settings": asdict(settings),
                        "slo_attainment": round(fmean(run["slo_attainment"] for run in runs), 5),
                        "gpu_hours": round(fmean(run["gpu_hours"] for run in runs), 3),
                    }
                )
            most = max(row["slo_attainment"] for row in rows)
            good = [row for row in rows if row["slo_attainment"] >= most - _AS_GOOD]
            best = min(good, key=lambda row: (row["gpu_hours"], -row["slo_attainment"]))
            chosen.setdefault(name, {})[rival] = best
            tried.setdefault(name, {})[rival] = rows
    return {
        "rule": "most SLO attainment; within 0.005 of it, fewest GPU-hours",
        "seeds": {name: list(some) for name, some in seeds.items()},
        "command": "kelvin simulate --tune --json",
        "chosen": chosen,
        "tried": tried,
    }
