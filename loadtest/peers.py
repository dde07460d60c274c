"""Kelvin beside what people use today, on the same machine in the same run.

    python -m loadtest.peers --json
    python -m loadtest.peers --gpu --json --out peers.json

On a CPU: the built-in model behind HTTP, each arm in processes of its own, the same Poisson
arrivals at shares of the best peer's saturation, equal jobs and a mix of 4 to 30 steps; and what
the pictures show, so that no speed is bought silently. torchao is no arm there: it refuses a CPU.

With `--gpu`: one NVIDIA GPU, SD3.5's real shapes with random weights, saturated pictures a second
and the time of one alone. `--cells` and `--arms` choose a part; the parts of several sittings
gather in the file that `--out` names, each complete in itself.

vLLM-Omni, SGLang-Diffusion and ComfyUI are no arms. What pip finds (2026-11-27), vllm-omni 0.30.0
and sglang 0.5.23, are wheels for CUDA that pin another diffusers, transformers or torch than
Kelvin's and so do not install beside it. ComfyUI is no package that pip finds, and counts a model's
layers by its width, as SD3.5's have it and the built-in one has not.
By their sources ComfyUI takes one prompt at a time, vLLM-Omni batches some models by steps
but not SD3.5, and SGLang-Diffusion batches whole requests, as the compiled arm with `serve.batch`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from loadtest import command_line
from loadtest.lateness import bottleneck_note
from loadtest.overhead import machine
from loadtest.peer_arms import ARMS
from loadtest.peer_servers import SERVERS
from loadtest.peer_settings import CELLS
from loadtest.peers_on_a_card import Rounds, measure_cell, ratios_of, targets_of
from loadtest.peers_on_a_cpu import LOADS, Plan
from loadtest.peers_on_a_cpu import measure as measure_on_cpu
from loadtest.results import STDERR, Results
from serve.errors import InvalidRequest

_USUAL_CELLS = "large-1024,large-512,medium-512"
_MIXES = ("equal", "mixed")


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


def loads_table(report: dict[str, Any]) -> Table:
    """Return what was measured on a CPU, an arm under a load a row."""
    table = Table(title="Kelvin and its peers, the built-in model behind HTTP")
    table.add_column("load")
    table.add_column("arm", no_wrap=True)
    for name in ("pictures/s", "p50 s", "p95 s", "p99 s", "in time", "failed", "n"):
        table.add_column(name, justify="right")
    for load, arms in report.get("loads", {}).items():
        for arm, found in arms.items():
            per_s = found["pictures_per_s"]
            if per_s is None:
                table.add_row(load, arm, "nothing was due")
                continue
            shown = [
                f"{found[f'p{each}_s']:.2f}" if "p50_s" in found else "" for each in (50, 95, 99)
            ]
            in_time = f"{100 * found['in_time']:.0f} %"
            counts = (str(found["failed"]), str(found["requests"]))
            table.add_row(load, arm, f"{per_s['median']:.3f}", *shown, in_time, *counts)
        table.add_section()
    runs = [
        found["generator"] for arms in report.get("loads", {}).values() for found in arms.values()
    ]
    if "generator_alone" in report:
        runs.append(report["generator_alone"])
    table.caption = bottleneck_note(runs)
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.peers", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--gpu", action="store_true", help="random weights of real size on a card")
    add("--rounds", type=command_line.whole(1, 100), default=2, help="turns that each arm gets")
    words = f"all; of {', '.join(SERVERS)}, with --gpu of {', '.join(ARMS)}"
    add("--arms", type=_listed, help=words)
    card = parser.add_argument_group("with --gpu")
    add = card.add_argument
    add("--cells", type=_names(CELLS), default=_USUAL_CELLS, help=f"of {', '.join(CELLS)}")
    add("--pictures", type=command_line.whole(1, 64), default=10, help="at once in each turn")
    count = command_line.whole(0, 1000)
    add("--alone", type=count, default=2, help="one after the other in each turn")
    add = parser.add_argument_group("without").add_argument
    add(
        "--seconds", type=command_line.number(1, 3600), default=40.0, help="of each turn's arrivals"
    )
    add("--steps", type=command_line.whole(1, 100), default=8, help="of equal jobs")
    add("--loads", type=_loads, default=LOADS, help="of the best peer's saturation")
    add("--mixes", type=_names(dict.fromkeys(_MIXES)), default=_MIXES, help=",".join(_MIXES))
    command_line.add_device_and_report(parser)
    options = parser.parse_args(arguments)
    known = ARMS if options.gpu else SERVERS
    options.arms = options.arms or tuple(known)
    if unknown := set(options.arms) - set(known):
        parser.error(f"--arms: {', '.join(sorted(unknown))}; of {', '.join(known)}")
    if not options.gpu:
        options.device = "cpu"
        return options
    for cell in (CELLS[name] for name in options.cells):
        if options.pictures % cell.batch:
            # What is left over would be a shape of its own, compiled in the midst of the run.
            parser.error(f"--pictures: a multiple of {cell.batch}, which {cell.name} makes a call")
    return options


def _loads(text: str) -> tuple[float, ...]:
    return tuple(map(command_line.number(0.05, 5), _listed(text)))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _names(known: dict[str, Any]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = _listed(text)
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
        try:
            report = json.loads(out.read_text(encoding="utf-8"))
            report["sittings"][-1]["command"]
        except (ValueError, LookupError, TypeError):
            raise InvalidRequest(
                "The file is no report of earlier sittings.",
                field="out",
                value=str(out),
                allowed="a new file, or one that this command has written",
            ) from None
        report.pop("ended_by", None)  # of the sitting before
    sittings = [*report.get("sittings", []), known | {"date": time.strftime("%Y-%m-%d")}]
    return report | {"sittings": sittings}, len(sittings) - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where a target is missed, or an arm that was asked for has failed."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    return _run_on_a_card(options) if options.gpu else _run_on_the_cpu(options)


def _run_on_the_cpu(options: argparse.Namespace) -> int:
    known = command_line.known_before("loadtest.peers", options, "rounds", "seconds", "steps")
    known |= {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "arms": SERVERS}
    plan = Plan(
        options.arms,
        options.loads,
        options.mixes,
        options.rounds,
        options.seconds,
        options.steps,
    )
    with (
        tempfile.TemporaryDirectory(prefix="kelvin-peers-") as folder,
        Results(known, options.out, options.json) as results,
    ):
        try:
            measure_on_cpu(plan, Path(folder), results)
        finally:
            STDERR.print(loads_table(results.report))
    targets = results.report.get("targets", {})
    is_whole = targets and "not_up" not in results.report
    return int(not is_whole or not all(each["met"] for each in targets.values()))


def _run_on_a_card(options: argparse.Namespace) -> int:
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
    asked = [results.report[cell][arm] for cell in options.cells for arm in options.arms]
    missed = [each for each in results.report["targets"].values() if not each["met"]]
    return int(bool(missed) or any("failed" in found for found in asked))


if __name__ == "__main__":
    sys.exit(main())
