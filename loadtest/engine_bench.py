"""The denoising engine under load, against one request at a time and against fixed batches.

`python -m loadtest.engine_bench --json` needs no card: `deployments/schedule.py` and its rivals
serve the same Poisson arrivals under a virtual clock, on step costs recorded on one. With `--gpu`
the real engine serves one cell's arrivals with real forwards instead, and is held against the
virtual clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtest import command_line
from loadtest.arrivals import MIXES, Mix, draw
from loadtest.cost_files import RECORDED, read_recording
from loadtest.engine_cells import KELVIN, LEAST_THROUGHPUT, LOADS, MOST_P95, cell, saturated
from loadtest.results import STDERR, Results
from serve.errors import ConfigurationError, KelvinError

MODELS = ("large", "medium")


def measure(options: argparse.Namespace, results: Results) -> None:
    """Fill every cell."""
    rows, saturations = [], []
    for model in options.models:
        costs, source = read_recording(options.costs, model)
        results.keep_part("costs", model, source)
        for mix in MIXES:
            full = saturated(model, mix, costs)
            saturations.append(full)
            for load in options.loads:
                one = cell(model, mix, costs, load, full["rate"], options.number, options.seeds)
                rows.append(one)
                STDERR.print(
                    f"{model} {mix.name} {load:.0%}: p95 {one['p95_ratio']} of {one['best_rival']}",
                    highlight=False,
                )
    results.report |= {"saturated": saturations, "cells": rows}
    results.keep(
        targets={
            "throughput_ratio": _target([full["throughput_ratio"] for full in saturations], min)
            | {"at_least": LEAST_THROUGHPUT, "met": all(full["met"] for full in saturations)},
            "p95_ratio": _target([one["p95_ratio"] for one in rows], max)
            | {"at_most": MOST_P95, "met": all(one["met"] for one in rows)},
            "p95_ratio_mixed": _target(
                [one["p95_ratio"] for one in rows if one["mix"] == MIXES[-1].name], max
            ),
        }
    )


def _target(ratios: Sequence[float], worst: Any) -> dict[str, Any]:
    return {"worst": worst(ratios), "mean": round(sum(ratios) / len(ratios), 4)}


def replay(options: argparse.Namespace, results: Results) -> None:
    """Serve one cell with real forwards."""
    import torch

    from loadtest.engine_replay import Replay, compare
    from loadtest.record_step_costs import load_mmdit, provenance, record

    model, mix = options.models[0], _replayed_mix(options)
    device = torch.device(options.device)
    mmdit = load_mmdit(model, device, options.precision)
    guided_only = all(scale > 1 for scale in mix.guidance_scales)
    counts = [count for count in options.rows if count > 1 or not guided_only]
    measured = record(mmdit, mix.sides, counts, options.warm_s, number=5)
    command = command_line.command_of("loadtest.engine_bench")
    results.keep(measured=provenance(mmdit, command) | measured.as_json())
    saturation = saturated(model, mix, measured)["rate"]
    rate = options.replay_load * saturation
    # Twice what is wanted is drawn, for Poisson arrivals may be sparse; the clock ends them.
    drawn = draw(mix, 2 * max(2, int(rate * options.replay_s)), rate, options.seeds[0])
    arrivals = [arrival for arrival in drawn if arrival.at <= options.replay_s] or drawn[:1]
    try:
        recorded, _ = read_recording(options.costs, model)
    except ConfigurationError:
        recorded = None
    results.keep(offered={"model": model, "mix": mix.name, "load": options.replay_load})
    results.keep(replay=compare(Replay(mmdit, measured), arrivals, measured, recorded))


def _replayed_mix(options: argparse.Namespace) -> Mix:
    mix = next(mix for mix in MIXES if mix.name == options.mix)
    sides = tuple(options.sides) if options.sides else mix.sides
    steps = tuple(options.steps) if options.steps else mix.steps
    return Mix(mix.name, sides, steps, mix.guidance_scales)


def table_of(report: dict[str, Any]) -> Table:
    """Return the cells as a table of Kelvin against the best rival."""
    table = Table(title="Kelvin against its best rival under the virtual clock")
    for name in ("model", "mix", "load", "best rival"):
        table.add_column(name)
    for name in ("req/s", "p50 s", "p95 s", "p99 s", "p95 slowdown", "rows", "p95 ratio"):
        table.add_column(name, justify="right")
    for one in [*report["saturated"], *report["cells"]]:
        own, rival = one["arms"][KELVIN], one["arms"][one["best_rival"]]
        place = [one["model"], one["mix"], f"{one['load']:.0%}" if "load" in one else "all at once"]
        if "load" not in one:
            throughputs = f"{own['throughput']:.3f} / {rival['throughput']:.3f}"
            ratio = f"throughput {one['throughput_ratio']:.3f}"
            table.add_row(*place, one["best_rival"], throughputs, *[""] * 4, "", ratio)
            continue
        pairs = [
            f"{own[name]:.2f} / {rival[name]:.2f}"
            for name in ("throughput", "p50", "p95", "p99", "slowdown_p95", "rows_per_forward")
        ]
        table.add_row(*place, one["best_rival"], *pairs, f"{one['p95_ratio']:.3f}")
    return table


def markdown_of(report: dict[str, Any]) -> str:
    """Return the cells as a table for a README: a line a model and mix."""
    lines = [
        "| model, mix | saturated throughput | "
        + " | ".join(f"p95 at {load:.0%} (slowdown)" for load in report["loads"])
        + " |",
        "| --- | --- |" + " --- |" * len(report["loads"]),
    ]
    for full in report["saturated"]:
        place = (full["model"], full["mix"])
        cells = [one for one in report["cells"] if (one["model"], one["mix"]) == place]
        parts = [
            f"{one['p95_ratio']:.2f}x ({one['slowdown_p95'][0]:.1f} / {one['slowdown_p95'][1]:.1f})"
            for one in cells
        ]
        lines.append(
            f"| {full['model'].title()}, {full['mix']} | {full['throughput_ratio']:.3f}x | "
            + " | ".join(parts)
            + " |"
        )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.engine_bench", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on stdout")
    add(
        "--out", type=command_line.file_to_write, help="file for the same JSON, written as it grows"
    )
    add("--model", dest="models", nargs="+", help="default: large and medium; with --gpu large")
    add("--costs", type=Path, default=RECORDED, help="recording of step costs")
    add("--number", type=int, default=4000, help="requests a cell and seed")
    add("--seeds", type=int, nargs="+", default=(1, 2, 3, 4, 5))
    add("--loads", type=float, nargs="+", default=LOADS, help="shares of saturation")
    add("--markdown", action="store_true", help="the table for a README, on stderr")
    add("--plot", type=command_line.file_to_write, help="PNG of p95 against load")
    real = parser.add_argument_group("with real forwards")
    add = real.add_argument
    add("--gpu", action="store_true", help="serve one cell with the real engine instead")
    add("--device", default="cuda")
    add("--precision", default="auto")
    add("--mix", choices=[mix.name for mix in MIXES], default="512")
    add("--replay-load", type=float, default=0.7)
    add("--replay-s", type=float, default=60.0, help="seconds of arrivals")
    add("--warm-s", type=float, default=8.0, help="of work before step costs are measured")
    add("--rows", type=int, nargs="+", default=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16))
    add("--sides", type=int, nargs="+", help="pixels, instead of the mix's own")
    add("--steps", type=int, nargs="+", help="instead of the mix's own")
    options = parser.parse_args(arguments)
    options.models = options.models or (("large",) if options.gpu else MODELS)
    if options.gpu and len(options.models) > 1:
        parser.error("--gpu takes one model")
    if options.number < 1 or not all(0 < load < 1 for load in options.loads):
        parser.error("at least one request, and loads between 0 and 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; exit 0 whether or not the targets are met."""
    options = parse_arguments(arguments)
    known = {
        "command": command_line.command_of("loadtest.engine_bench"),
        "benchmark": "engine replay" if options.gpu else "engine",
        "number": options.number,
        "seeds": list(options.seeds),
        "loads": list(options.loads),
    }
    try:
        with Results(known, options.out, options.json) as results:
            (replay if options.gpu else measure)(options, results)
    except KelvinError as error:
        STDERR.print(str(error), markup=False)
        return 1
    if not options.gpu:
        STDERR.print(table_of(results.report))
        if options.markdown:
            STDERR.print(markdown_of(results.report), highlight=False, markup=False, soft_wrap=True)
        if options.plot:
            from loadtest.load_plot import draw_plot

            draw_plot(results.report).save(options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
