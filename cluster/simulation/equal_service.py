"""Rivals at equal service: their grid of settings beside Kelvin, all on the tuning seeds.

A rival with its best settings may serve better by holding far more cards, or worse for fewer. So
for each rival two rows of its grid are found: the fewest GPU-hours that serve as many requests in
time as Kelvin does, and the most requests in time for hardly more GPU-hours than Kelvin takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from cluster.simulation.policies import CHOSEN
from serve.errors import ConfigurationError

AS_GOOD = 0.005  # of all requests
MOST_HOURS = 1.05


def equal_service(
    name: str, runs: Sequence[Mapping[str, Any]], path: Path = CHOSEN
) -> dict[str, Any] | None:
    """Compare Kelvin's runs of a scenario with each rival's grid.

    Args:
        name: Of the scenario.
        runs: Figures of Kelvin on its tuning seeds.
        path: What `kelvin simulate --tune` kept.

    Returns:
        Kelvin's figures and for each rival the two rows, None where no setting does it. None where
        the scenario was never tuned for.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    try:
        tried = json.loads(path.read_text(encoding="utf-8"))["tried"] if path.exists() else {}
        grids = tried.get(name)
        if grids is None or not runs:
            return None
        ours = {
            figure: round(fmean(run[figure] for run in runs), 5)
            for figure in ("slo_attainment", "gpu_hours")
        }
        found: dict[str, Any] = {"kelvin": ours}
        for rival, rows in grids.items():
            as_good = [r for r in rows if r["slo_attainment"] >= ours["slo_attainment"] - AS_GOOD]
            as_cheap = [r for r in rows if r["gpu_hours"] <= ours["gpu_hours"] * MOST_HOURS]
            found[rival] = {
                "fewest_gpu_hours_as_good": min(
                    as_good, key=lambda row: row["gpu_hours"], default=None
                ),
                "most_attained_as_cheap": max(
                    as_cheap, key=lambda row: row["slo_attainment"], default=None
                ),
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"The rivals' settings cannot be read: {error!r}", field="settings", value=str(path)
        ) from error
    return found
