"""The simulator's entrances: a scenario, the comparison of policies, the fit, rivals' settings.

Everything is returned as JSON can hold it; `kelvin simulate` prints it. Nothing here needs Ray, a
card or time: the clock is a number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.simulation.measures import Series
from cluster.simulation.policies import CHOSEN, POLICIES, policy
from cluster.simulation.scenario import (
    Scenario,
    held_out_names,
    load_scenario,
    scenario_names,
)
from cluster.simulation.suite import Told, run_suite
from cluster.simulation.thermal_fit import report as fit_report
from cluster.simulation.tuning import tune
from cluster.simulation.world import World
from serve.errors import ConfigurationError

__all__ = ["compare", "draw", "fit_report", "load_scenario", "scenario_names", "simulate"]
__all__ += ["tune_rivals"]


def simulate(
    scenario: Scenario,
    policies: Sequence[str],
    seed: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Series]]:
    """Run one scenario under some policies.

    Args:
        scenario: What happens.
        policies: Their names; none means all four.
        seed: The scenario's first if None.
        progress: Called with the policy and the simulated seconds so far.

    Returns:
        A report, and series for the plot by policy.

    Raises:
        ConfigurationError: There is no such policy.
    """
    drawn = scenario.seeds[0] if seed is None else seed
    found: dict[str, Any] = {}
    series: dict[str, Series] = {}
    for chosen in [policy(name, scenario.name) for name in policies or POLICIES]:
        begun = time.perf_counter()

        def tell(now: float, name: str = chosen.name) -> None:
            if progress is not None:
                progress(name, now)

        outcome = World(scenario, chosen.control, drawn, tell).run()
        found[chosen.name] = {
            **outcome.figures,
            **outcome.told,
            "settings": None if chosen.settings is None else asdict(chosen.settings),
            "took_s": round(time.perf_counter() - begun, 2),
        }
        series[chosen.name] = outcome.series
    report = {
        "scenario": scenario.name,
        "description": " ".join(scenario.description.split()),
        "seed": drawn,
        "simulated_s": scenario.duration_s,
        "slo": f"latency at most {scenario.slo_factor:g} times that of an idle cluster of "
        f"{scenario.reference_kind}",
        "policies": found,
    }
    return report, series


def compare(
    names: Sequence[str] = (),
    seeds: int | None = None,
    processes: int | None = None,
    told: Told | None = None,
    held_out: bool = False,
) -> dict[str, Any]:
    """Compare all policies on scenarios, and time the plan and the routing.

    Args:
        names: Of scenarios; none means all that are shipped.
        seeds: How many of each scenario's; None: all.
        processes: At a time; as many as there are cores if None.
        told: Hears of each run that is done.
        held_out: With seeds, and of all scenarios also those, that no setting was chosen by.

    Raises:
        ConfigurationError: A scenario cannot be read.
    """
    from cluster.simulation.policy_times import measure_policies

    times = measure_policies()  # while nothing else runs here
    begun = time.perf_counter()
    shipped = [*scenario_names(), *(held_out_names() if held_out else ())]
    report = run_suite(names or shipped, seeds, _processes(processes), told, held_out)
    report["targets"] |= times.pop("targets")
    return {
        "command": _suite_command(names, seeds, held_out),
        "took_s": round(time.perf_counter() - begun, 1),
        "policy_times": times,
        **report,
    }


def tune_rivals(
    names: Sequence[str] = (), processes: int | None = None, told: Told | None = None
) -> dict[str, Any]:
    """Choose the rivals' settings anew and keep them; scenarios not named keep theirs.

    Raises:
        ConfigurationError: A scenario cannot be read, or the file cannot be written.
    """
    report = tune(names or scenario_names(), _processes(processes), told)
    try:
        if CHOSEN.exists():
            before = json.loads(CHOSEN.read_text(encoding="utf-8"))
            for part in ("seeds", "chosen", "tried"):
                report[part] = {**before[part], **report[part]}
        CHOSEN.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"The rivals' settings cannot be kept: {error!r}", field="settings", value=str(CHOSEN)
        ) from error
    return report


def draw(report: dict[str, Any], series: dict[str, Series], path: Path) -> None:
    """Draw a run's page into a PNG or HTML file.

    Raises:
        ConfigurationError: The file's name ends otherwise, or it cannot be written.
    """
    from cluster.simulation.plot import draw_page, save_page

    allowed = "a name that ends in .png or .html, in a folder that exists"
    if path.suffix not in (".png", ".html"):
        raise ConfigurationError(
            "The plot is a PNG or HTML file.", field="plot", value=str(path), allowed=allowed
        )
    title = f"{report['scenario']}, seed {report['seed']}: {report['description']}"
    try:
        save_page(draw_page(title[:190], series), path, title)
    except OSError as error:
        raise ConfigurationError(
            f"The plot cannot be written: {error.strerror}",
            field="plot",
            value=str(path),
            allowed=allowed,
        ) from error


def _suite_command(names: Sequence[str], seeds: int | None, held_out: bool) -> str:
    given = ["--held-out"] if held_out else []
    given += [f"--scenario {name}" for name in names]
    given += [] if seeds is None else [f"--seeds {seeds}"]
    return " ".join(["kelvin simulate --suite", *given, "--json"])


def _processes(given: int | None) -> int:
    return max(1, given if given is not None else os.cpu_count() or 1)
