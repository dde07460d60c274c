"""How long one denoising step takes, alone on a card: diffusers eager, compiled, and Kelvin.

    python -m loadtest.denoise_bench --model large --size 1024 --sustained 30 --ablations --json

SD3.5's real shapes with random weights, which cost the same as trained ones. A step is one forward
with two rows, as guidance needs. All arms run in one process and in turns; times are medians of
CUDA events. `--pretend` takes the path that a smaller card would, under a cap of its memory: parity
and bytes are real, speeds are this card's and say nothing of the other's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import diffusers
import torch
from rich.table import Table
from torch import Tensor

from deployments.sd3.optimizations import Optimizations
from deployments.sd3.precision import REQUESTABLE, PrecisionChoice, choose_precision
from loadtest import command_line
from loadtest.denoise_arms import (
    ARMS,
    bucket,
    diffusers_steps,
    diffusers_velocity,
    forget_garbage,
    kelvin_step,
    random_kelvin,
    relative_error,
)
from loadtest.forward_timing import alternate, sustain, time_steps
from loadtest.results import STDERR, Results
from loadtest.sd35 import MODELS, Inputs, config, largest_side, random_inputs, random_transformer
from loadtest.stage_memory import GIB, REAL, TINY, measure_stages

CAP_GIB = 22.0
"""What a 24 GB card leaves to one process."""

_ATTENTIONS = ("cudnn", "flash", "flash4", "efficient")
_PRETENDABLE = ("sm_86", "sm_89")

_AT_LEAST: dict[tuple[str, int], dict[str, float]] = {
    ("large", 1024): {"eager": 2.1, "compiled": 1.45},
    ("large", 512): {"eager": 2.2},
    ("medium", 1024): {"eager": 2.1},
    ("medium", 512): {"eager": 3.5},
}
_AT_MOST: dict[tuple[str, int], dict[str, float]] = {
    ("large", 1024): {"kelvin_ms": 90.0, "resident_gib": 8.3, "peak_gib": 10.0}
}


def measure(options: argparse.Namespace, results: Results) -> None:
    """Run the phases that were asked for; each is kept as soon as it is measured."""
    command_line.check_side(options.size, largest_side(options.model))
    device = torch.device(options.device)
    precision = choice_of(options, device)
    results.keep(precision={"label": precision.label, "reason": precision.reason})
    inputs = random_inputs(
        config(options.model), options.rows, options.size // 8, options.size // 8, device
    )
    steps: dict[str, Callable[[], Tensor]] = {}
    if "kelvin" in options.arms:
        steps["kelvin"] = _kelvin(options, device, precision, inputs, results)
    if rivals := tuple(name for name in options.arms if name != "kelvin"):
        model = random_transformer(options.model, device, torch.bfloat16)
        steps = diffusers_steps(rivals, model, inputs) | steps
    if steps and options.steps:
        took = alternate(steps, options.steps, options.warm_up, device)
        results.keep(**_short(took, options))
    if steps and options.sustained:
        medians = {}
        for name, step in steps.items():
            watched = sustain(step, options.sustained, device)
            results.keep_part("sustained", name, watched)
            medians[name] = watched["median_ms"]
        results.keep(sustained_ratios=_ratios(medians))
    steps.clear()
    forget_garbage(device)
    if options.ablations:
        _ablations(options, device, precision, inputs, results)
    if options.stages:
        forget_garbage(device)
        sizes = TINY if options.model.startswith("tiny") else REAL
        side = min(options.size, 1024)
        results.keep(stages=measure_stages(device, precision, side=side, sizes=sizes))


def choice_of(options: argparse.Namespace, device: torch.device) -> PrecisionChoice:
    """Choose for the card, or for the one that it shall pretend to be, capping its memory."""
    if options.pretend and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * GIB / total))
    return choose_precision(options.precision, device, pretend=options.pretend)


def _kelvin(
    options: argparse.Namespace,
    device: torch.device,
    precision: PrecisionChoice,
    inputs: Inputs,
    results: Results,
) -> Callable[[], Tensor]:
    """Build Kelvin's model alone on the card; keep its memory and its distance from diffusers."""
    model = random_transformer(options.model, device, torch.bfloat16)
    with torch.no_grad():
        expected = diffusers_velocity(model, inputs).cpu()
    del model
    forget_garbage(device)
    mmdit = random_kelvin(options.model, device, precision, inputs)
    step = kelvin_step(mmdit, inputs)
    found = [step() for _ in range(3)][-1]
    height, width, text_tokens, rows = bucket(inputs)
    kept: dict[str, Any] = {
        "resident_gib": mmdit.resident_bytes / GIB,
        "path": mmdit.path(height, width, text_tokens, rows),
        "attention": mmdit.attention_backend(height, width, text_tokens, rows),
        "relative_difference_from_eager_bf16": relative_error(found, expected),
        "finite": bool(torch.isfinite(found).all()),
    }
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        kept["allocated_gib"] = torch.cuda.memory_allocated(device) / GIB
        kept["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        kept["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    results.keep(kelvin=kept)
    return step


def _short(took: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    medians = {name: statistics.median(each) for name, each in took.items()}
    return {
        "short_ms": {
            name: {"median": medians[name], "least": min(each), "most": max(each), "n": len(each)}
            for name, each in took.items()
        },
        "ratios": _ratios(medians),
        "speed_of": "this card, not the one it pretends to be" if options.pretend else "this card",
    }


def _ratios(medians: dict[str, float]) -> dict[str, float]:
    return {
        f"{name}/kelvin": medians[name] / medians["kelvin"]
        for name in medians
        if name != "kelvin" and "kelvin" in medians
    }


def _ablations(
    options: argparse.Namespace,
    device: torch.device,
    precision: PrecisionChoice,
    inputs: Inputs,
    results: Results,
) -> None:
    """Time Kelvin with each optimisation off alone, between two times with all on."""
    everything = Optimizations()
    variants = {"all_on": everything}
    for field in fields(Optimizations):
        if field.type in ("bool", bool):
            off: dict[str, Any] = {field.name: False}
            variants[f"without_{field.name}"] = replace(everything, **off)
    if device.type == "cuda":
        variants |= {f"attention_{n}": replace(everything, attention=n) for n in _ATTENTIONS}
    variants["all_on_again"] = everything
    base: float | None = None
    for name, variant in variants.items():
        kept: dict[str, Any]
        try:
            kept = _variant(options, device, precision, inputs, variant)
        except Exception as error:  # what this machine cannot do must not end the others
            kept = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        else:
            base = kept["median_ms"] if base is None else base
            kept["costs_ms"] = kept["median_ms"] - base
        forget_garbage(device)
        results.keep_part("ablations", name, kept)


def _variant(
    options: argparse.Namespace,
    device: torch.device,
    precision: PrecisionChoice,
    inputs: Inputs,
    variant: Optimizations,
) -> dict[str, Any]:
    mmdit = random_kelvin(options.model, device, precision, inputs, variant)
    step = kelvin_step(mmdit, inputs)
    time_steps(step, min(options.warm_up, 3), device)
    kept = {
        "median_ms": statistics.median(time_steps(step, min(options.steps or 10, 10), device)),
        "resident_gib": mmdit.resident_bytes / GIB,
        "attention": mmdit.attention_backend(*bucket(inputs)),
    }
    if device.type == "cuda":
        kept["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return kept


def targets_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the model and size of a report must reach and whether it does.

    Targets of speed hold for a card as it is, not for one that pretends.
    """
    key = (report["model"], report["size"])
    values = dict(report.get("kelvin", {}))
    if not report["pretend"]:
        values |= {"kelvin_ms": report.get("short_ms", {}).get("kelvin", {}).get("median")}
    targets: dict[str, dict[str, Any]] = {}
    for name, most in _AT_MOST.get(key, {}).items():
        if (value := values.get(name)) is not None:
            targets[name] = {"at_most": most, "is": value, "met": value <= most}
    for arm, least in _AT_LEAST.get(key, {}).items():
        value = report.get("ratios", {}).get(f"{arm}/kelvin")
        if value is not None and not report["pretend"]:
            targets[f"{arm}/kelvin"] = {"at_least": least, "is": value, "met": value >= least}
    if report["pretend"] and (peak := report.get("stages", {}).get("peak_gib")) is not None:
        targets["stages_peak_gib"] = {"at_most": CAP_GIB, "is": peak, "met": peak <= CAP_GIB}
    return targets


def table_of(report: dict[str, Any]) -> Table:
    """Return the times as a table, an arm a row."""
    title = f"SD3.5 {report['model']}, {report['size']} px, {report['rows']} rows"
    table = Table(title=f"{title}, {report['device']}")
    table.add_column("arm", no_wrap=True)
    for name in ("ms", "sustained ms", "J a step", "W", "SM MHz", "against Kelvin"):
        table.add_column(name, justify="right")

    def shown(value: float | None, digits: int = 1) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for arm in ARMS:
        short = report.get("short_ms", {}).get(arm, {})
        long = report.get("sustained", {}).get(arm, {})
        if not short and not long:
            continue
        clocks = long.get("sm_clock_mhz")
        table.add_row(
            arm,
            shown(short.get("median")),
            shown(long.get("median_ms")),
            shown(long.get("joules_per_step")),
            shown(long.get("mean_w"), 0),
            "" if clocks is None else f"{clocks[0]:.0f}-{clocks[2]:.0f}",
            shown(report.get("ratios", {}).get(f"{arm}/kelvin"), 2),
        )
    table.add_section()
    for name, variant in report.get("ablations", {}).items():
        cost = variant.get("costs_ms")
        words = variant.get("error", "") if cost is None else f"{cost:+.1f} ms"
        table.add_row(name, shown(variant.get("median_ms")), "", "", "", "", words)
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.denoise_bench", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", default="large", choices=MODELS)
    add("--size", type=command_line.side, default=1024, help="side of the picture, pixels")
    add("--rows", type=command_line.rows, default=2)
    add("--arms", help="comma-separated, or `none`; all, but where pretending only `kelvin`")
    count = command_line.whole(0, 10_000)
    add("--steps", type=count, default=30, help="timed steps an arm; 0 leaves this phase out")
    add("--warm-up", type=count, default=5, help="steps before")
    add(
        "--sustained",
        type=command_line.seconds,
        default=0.0,
        help="seconds without pause for each arm",
    )
    add("--ablations", action="store_true", help="each optimisation off alone")
    add("--stages", action="store_true", help="memory of text encoding and decoding together")
    add("--precision", default="fp8", choices=REQUESTABLE, help="of Kelvin")
    add("--pretend", choices=_PRETENDABLE, help=f"that card's path, under {CAP_GIB:.0f} GiB")
    command_line.add_device_and_report(parser)
    options = parser.parse_args(arguments)
    options.arms = options.arms or ("kelvin" if options.pretend else ",".join(ARMS))
    options.arms = tuple(name for name in options.arms.split(",") if name != "none")
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"--arms: {', '.join(sorted(unknown))}; known are {', '.join(ARMS)}, none")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    diffusers.utils.logging.set_verbosity_error()
    known = command_line.known_before(
        "loadtest.denoise_bench", options, "model", "size", "rows", "pretend"
    )
    with Results(known, options.out, options.json) as results:
        try:
            measure(options, results)
        finally:
            results.keep(targets=targets_of(results.report))
            STDERR.print(table_of(results.report))


if __name__ == "__main__":
    sys.exit(main())
