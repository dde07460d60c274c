"""What the two articles that the project started from claim, and what is measured of it.

    python -m loadtest.claims --json --plot claims.png

(a), diffusers' pipeline as in Ray's own tutorial, and Kelvin serve the same Poisson arrivals for
three minutes each. On an NVIDIA GPU both run in this process with random weights of SD3.5's real
sizes; on a CPU each is a server with the built-in model, and power and temperature have no reading.
What pictures look like to CLIP and FID cannot be told without the trained weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loadtest import command_line
from loadtest.claims_measured import on_a_card, on_a_cpu
from loadtest.lateness import bottleneck_note
from loadtest.overhead import machine
from loadtest.peer_settings import CELLS
from loadtest.results import STDERR, Results
from loadtest.trace_plot import Panel, draw_trace

NOT_TESTABLE = "not testable without the weights"
NO_READING = "no reading"

CLAIMS = (
    ("latency", "-30 to -50 %", "latency_s", -0.30),
    ("throughput", "+60 %", "saturated_per_s", 0.60),
    ("memory", "-26 to -45 %", "memory_gib", -0.26),
    ("power", "-20 %", "mean_w", -0.20),
    ("temperature", "-8 to -15 C", "temperature_c", -8.0),
    ("CLIP score", "-1 %", None, None),
    ("FID", "+4 %", None, None),
)
"""What, as claimed, by which figure it is measured, and the weaker end: a share, or degrees."""


def table_of(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each claim.

    Args:
        arms: Figures of `tutorial` and `kelvin`.
    """
    lines: list[dict[str, Any]] = []
    for what, claimed, figure, bound in CLAIMS:
        line: dict[str, Any] = {"what": what, "claimed": claimed}
        if figure is None or bound is None:
            lines.append(line | {"measured": NOT_TESTABLE, "holds": None})
            continue
        peer, ours = (arms.get(name, {}).get(figure) for name in ("tutorial", "kelvin"))
        line |= {"peer": peer, "kelvin": ours}
        if peer is None or ours is None:
            lines.append(line | {"measured": NO_READING, "holds": None})
            continue
        change = ours - peer if what == "temperature" else ours / peer - 1
        words = f"{change:+.1f} C" if what == "temperature" else f"{100 * change:+.0f} %"
        holds = change >= bound if bound > 0 else change <= bound
        lines.append(line | {"measured": words, "holds": holds})
    return lines


def shown(lines: Sequence[dict[str, Any]], served: Mapping[str, Any]) -> Table:
    """Return the lines as a table, which says if the generator lagged while arms served."""
    table = Table(title="Claims of the articles")
    for name in ("what", "claimed", "(a)", "Kelvin", "measured", "holds"):
        table.add_column(name)
    for line in lines:
        values = (line.get("peer"), line.get("kelvin"))
        figures = ("" if value is None else f"{value:.3g}" for value in values)
        holds = {True: "yes", False: "no", None: ""}[line["holds"]]
        table.add_row(line["what"], line["claimed"], *figures, line["measured"], holds)
    table.caption = bottleneck_note(each["generator"] for each in served.values())
    return table


def plot(arms: dict[str, Any], path: Path) -> None:
    """Draw latency, power and temperature of both arms, one after the other."""
    seconds: list[float] = []
    lines: dict[str, list[float | None]] = {"latency s": [], "power W": [], "temperature C": []}
    phases = []
    begin = 0.0
    for name, arm in arms.items():
        phases.append((begin, name))
        points = [(at, "latency s", value) for at, value in arm["latencies"]]
        for at, watts, degrees in arm["readings"]:
            points += [(at, "power W", watts), (at, "temperature C", degrees)]
        for at, line, value in sorted(points, key=lambda point: point[0]):
            seconds.append(begin + at)
            for other, values in lines.items():
                values.append(value if other == line else None)
        begin = max(seconds, default=0.0) + 1.0
    if seconds:
        panels = [Panel(name, {name: values}) for name, values in lines.items() if any(values)]
        draw_trace(seconds, panels, phases).save(path)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.claims", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--seconds", type=command_line.number(1, 3600), default=180.0, help="of arrivals, each arm")
    words = "of what (a) does at most, one picture after the other"
    add("--load", type=command_line.number(0.05, 2), default=0.8, help=words)
    add("--cell", choices=tuple(CELLS), default="large-1024", help="on a GPU: model and size")
    add("--steps", type=command_line.whole(1, 100), default=20, help="on a CPU")
    add("--saturated", type=command_line.whole(1, 64), default=5, help="pictures at once")
    add("--plot", type=command_line.file_to_write, help="PNG of both arms over time")
    command_line.add_device_and_report(parser)
    add("--in-process", action="store_true", help="as on a GPU, also on a CPU: for tests")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where a claim that was measured does not hold, or a request failed."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    known = command_line.known_before("loadtest.claims", options, "load", "seconds")
    known |= {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    in_process = options.in_process or options.device.startswith("cuda")
    with (
        tempfile.TemporaryDirectory(prefix="kelvin-claims-") as folder,
        Results(known, options.out, options.json) as results,
    ):
        if in_process:
            cell = CELLS[options.cell]
            results.keep(cell=cell.name, steps=cell.steps)
            on_a_card(cell, options, torch.device(options.device), results)
        else:
            results.keep(cell="built-in model, 256 px", steps=options.steps)
            on_a_cpu(options, Path(folder), results)
        arms = results.report["arms"]
        for arm in arms.values():
            took = [seconds for _, seconds in arm["latencies"]]
            arm["latency_s"] = statistics.median(took) if took else None
        results.keep(claims=table_of(arms))
        STDERR.print(shown(results.report["claims"], results.report["served"]))
        if options.plot:
            plot(arms, options.plot)
    failed = sum(each.get("failed", 0) for each in results.report["served"].values())
    return int(bool(failed) or any(line["holds"] is False for line in results.report["claims"]))


if __name__ == "__main__":
    sys.exit(main())
