"""`kelvin simulate`: a cluster under a virtual clock, and its policies compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from serve.commands.output import EXIT_FAILED, EXIT_OK, console, write_json
from serve.errors import InvalidRequest

if TYPE_CHECKING:
    from rich.progress import Progress

_COLUMNS = (
    ("slo_attainment", "in time", ".2%"),
    ("p50_s", "p50 s", ".2f"),
    ("p95_s", "p95 s", ".2f"),
    ("throttled_gpu_s", "throttled s", ".0f"),
    ("peak_temperature_c", "peak C", ".1f"),
    ("gpu_hours", "GPU-hours", ".2f"),
    ("joules_per_image", "J/image", ".0f"),
)


def simulate(
    *,
    scenario: str | None,
    policies: Sequence[str],
    seed: int | None,
    plot: Path | None,
    as_json: bool,
) -> int:
    """Run one scenario under some policies, all four by default.

    Raises:
        ConfigurationError: The scenario or policy is wrong, or the plot cannot be written.
        InvalidRequest: No scenario is named.
    """
    from cluster.simulate import draw, load_scenario, scenario_names
    from cluster.simulate import simulate as run

    if scenario is None:
        raise InvalidRequest(
            "There is nothing to simulate.",
            field="scenario",
            allowed=f"--scenario with one of {', '.join([*scenario_names(), 'day'])} or a YAML "
            "file, or --suite, --fit, --day, --tune",
        )
    chosen = load_scenario(scenario)
    with _bars() as bars:
        tasks: dict[str, Any] = {}

        def show(policy: str, now: float) -> None:
            if policy not in tasks:
                tasks[policy] = bars.add_task(policy, total=chosen.duration_s)
            bars.update(tasks[policy], completed=now)

        report, series = run(chosen, policies, seed, show)
    if plot is not None:
        draw(report, series, plot)
        report["plot"] = str(plot)
    if as_json:
        write_json(report)
    else:
        table = _table("policy")
        for name, figures in report["policies"].items():
            table.add_row(name, *(format(figures[key], form) for key, _, form in _COLUMNS))
        console().print(table)
        console().print(f"in time: {report['slo']}")
    return EXIT_OK


def suite(
    *,
    scenarios: Sequence[str],
    seeds: int | None,
    processes: int | None,
    as_json: bool,
    held_out: bool = False,
) -> int:
    """Compare all policies; return 1 if a target is missed."""
    from cluster.simulate import compare

    with _count() as told:
        report = compare(scenarios, seeds, processes, told, held_out)
    if as_json:
        write_json(report)
    else:
        _print_suite(report)
    met = all(target["met"] is not False for target in report["targets"].values())
    return EXIT_OK if met else EXIT_FAILED


def tune(*, scenarios: Sequence[str], processes: int | None, as_json: bool) -> int:
    """Choose the rivals' settings anew."""
    from cluster.simulate import tune_rivals

    with _count() as told:
        report = tune_rivals(scenarios, processes, told)
    if as_json:
        write_json(report)
    else:
        for name, rivals in report["chosen"].items():
            for rival, best in rivals.items():
                console().print(f"{name}, {rival}: {best}", soft_wrap=True)
    return EXIT_OK


def fit(*, as_json: bool) -> int:
    """Fit the thermal model; return 1 if it predicts the cooling part worse than it should."""
    from cluster.simulate import fit_report

    report = fit_report()
    if as_json:
        write_json(report)
    else:
        console().print(
            f"heating: {report['rms_heating_c']} C RMS; cooling, predicted: "
            f"{report['rms_cooling_c']} C RMS, {report['rms_cooling_after_2_s_c']} C after 2 s"
        )
        console().print(f"{report['parameters']}")
    return EXIT_OK if report["targets"]["rms_cooling_c"]["met"] else EXIT_FAILED


def _print_suite(report: dict[str, Any]) -> None:
    for name, policies in report["cells"].items():
        table = _table(name)
        for policy, figures in policies.items():
            row = []
            for key, _, form in _COLUMNS:
                half = figures[key]["half_of_95_percent_interval"]
                around = "" if half is None else f" ±{format(half, form)}"
                row.append(format(figures[key]["mean"], form) + around)
            table.add_row(policy, *row)
        console().print(table)
    verdicts = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]not to be told[/]"}
    for target, found in report["targets"].items():
        console().print(f"{verdicts[found['met']]:<24} {target}: {found['is']}", soft_wrap=True)


def _table(first: str) -> Table:
    table = Table(pad_edge=False)
    table.add_column(first)
    for _, heading, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    return table


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console(),
        disable=not console().is_terminal,
    ) as bars:
        yield bars


@contextmanager
def _count() -> Iterator[Callable[[int, int, Any], None]]:
    """Yield what shows how many runs are done."""
    with _bars() as bars:
        task = bars.add_task("runs", total=None)

        def told(done: int, of: int, job: Any) -> None:
            bars.update(task, completed=done, total=of, description=f"{done} of {of} runs")

        yield told
