"""Kelvin beside what people use today, on the same machine in the same run.

    python -m loadtest.peers --gpu --json --out peers.json

One NVIDIA GPU, SD3.5's real shapes with random weights: saturated pictures a second, and the time
of one alone. `--cells` and `--arms` choose a part; the parts of several sittings gather in the file
that `--out` names, each complete in itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loadtest import command_line
from loadtest.peer_arms import ARMS
from loadtest.peer_settings import CELLS
from loadtest.peers_on_a_card import Rounds, measure_cell, ratios_of, targets_of
from loadtest.results import STDERR, Results

_USUAL_CELLS = "large-1024,large-512,medium-512"


def table_of(report: dict[str, Any]) -> Table:
    """Return what was measured on a card, an arm of a cell a row."""
    table = Table(title="Kelvin and its peers")
    for name in ("cell", "arm"):
        table.add_column(name, no_wrap=True)
    for name in ("pictures/s", "spread", "alone s", "GiB", "J a picture", "Kelvin is"):
        table.add_column(name, justify="right")

    def shown(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for cell in (name for name in CELLS if name in report):
        ratios = ratios_of(report[cell])
        for arm, found in report[cell].items():
            if "failed" in found:
                table.add_row(cell, arm, "failed", found["failed"][:40])
                continue
            per_s, alone = found["pictures_per_s"], found["alone_s"]
            ratio = ratios.get(arm, {}).get("pictures_per_s")
            table.add_row(
                cell,
                arm,
                shown(per_s["median"], 3),
                f"{per_s['least']:.3f}-{per_s['most']:.3f}",
                shown(alone["median"] if alone else None, 2),
                shown(found["peak_gib"], 1),
                shown(found["joules_per_picture"], 0),
                "" if ratio is None else f"{ratio:.2f}x",
            )
        table.add_section()
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.peers", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--gpu", action="store_true", required=True, help="random weights of real size on a card")
    add("--cells", type=_names(CELLS), default=_USUAL_CELLS, help=f"of {', '.join(CELLS)}")
    add("--arms", type=_names(ARMS), default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    count = command_line.whole(0, 1000)
    add("--rounds", type=command_line.whole(1, 100), default=2, help="turns that each arm gets")
    add("--pictures", type=command_line.whole(1, 64), default=10, help="at once in each turn")
    add("--alone", type=count, default=2, help="one after the other in each turn")
    command_line.add_device_and_report(parser)
    options = parser.parse_args(arguments)
    for cell in (CELLS[name] for name in options.cells):
        if options.pictures % cell.batch:
            # What is left over would be a shape of its own, compiled in the midst of the run.
            parser.error(f"--pictures: a multiple of {cell.batch}, which {cell.name} makes a call")
    return options


def _names(known: dict[str, Any]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; of {', '.join(known)}")
        return names

    return parse


def _before(options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Return the report that this sitting adds to, and the sitting's number."""
    known = command_line.known_before("loadtest.peers", options)
    out: Path | None = options.out
    report: dict[str, Any] = {}
    if out is not None and out.is_file():
        report = json.loads(out.read_text(encoding="utf-8"))
    sittings = [*report.get("sittings", []), known | {"date": time.strftime("%Y-%m-%d")}]
    return report | {"sittings": sittings}, len(sittings) - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where a target is missed or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    report, sitting = _before(options)
    rounds = Rounds(options.rounds, options.pictures, options.alone)
    with Results(report, options.out, options.json) as results:
        try:
            for name in options.cells:
                device = torch.device(options.device)
                measure_cell(CELLS[name], options.arms, rounds, device, results, sitting)
        finally:
            results.keep(targets=targets_of(results.report))
            STDERR.print(table_of(results.report))
    return int(not all(each["met"] for each in results.report["targets"].values()))


if __name__ == "__main__":
    sys.exit(main())
