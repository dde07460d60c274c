"""What LoRAs cost in a mixed batch, and whether each row is what it would be alone.

    python -m loadtest.lora_bench --json

SD3.5's real shapes with random weights, and random LoRAs that change a velocity visibly. Every row
of a forward has another of eight LoRAs; the same forward without is timed in turns with it. Then
twenty requests with those eight go through the engine together, and again without, and alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from rich.table import Table

from deployments.sd3.lora_arena import pages_of
from deployments.sd3.mmdit import Mmdit
from deployments.sd3.precision import REQUESTABLE, choose_precision
from loadtest import command_line
from loadtest.denoise_arms import diffusers_velocity, forget_garbage
from loadtest.lora_forwards import accuracy, place, rows_of, timed_forwards
from loadtest.lora_requests import run_requests
from loadtest.random_lora import LAYERS
from loadtest.results import STDERR, Results
from loadtest.sd35 import MODELS, config, largest_side, random_inputs, random_transformer

TARGET_RATIO = 1.15
TARGET_RANK = 16


def measure(options: argparse.Namespace, results: Results) -> None:
    """Run all phases; each is kept as soon as it is measured."""
    command_line.check_side(options.size, largest_side(options.model))
    device = torch.device(options.device)
    precision = choose_precision(options.precision, device)
    results.keep(precision={"label": precision.label, "reason": precision.reason})
    side = options.size // 8
    inputs = random_inputs(config(options.model), max(options.rows), side, side, device)
    model = random_transformer(options.model, device, torch.bfloat16)
    with torch.no_grad():
        exact = diffusers_velocity(model, rows_of(inputs, 0, 2)).cpu()
    del model
    forget_garbage(device)
    mmdit = Mmdit.from_diffusers(
        random_transformer(options.model, device, torch.bfloat16), device, precision
    )
    forget_garbage(device)
    most_pages = options.loras * max(pages_of(rank) for rank in options.ranks)
    page_bytes = mmdit.lora_page_bytes()
    arena = mmdit.make_room_for_loras(most_pages)
    for rows in {*options.rows, 2}:
        mmdit.prepare(side, side, inputs.prompt_embeds.shape[1], rows)
    results.keep(memory={"page_mib": page_bytes / 2**20, "pages": most_pages, "bytes": arena.bytes})
    for layers in options.layers:
        for rank in options.ranks:
            placed, write_ms = place(mmdit, rank, layers, options.loras)
            for rows in options.rows:
                name = f"{layers}, rank {rank}, {rows} rows"
                timed = timed_forwards(mmdit, rows_of(inputs, 0, rows), placed, options.steps)
                results.keep_part("forwards", name, timed)
            results.keep_part("write_ms_a_page", f"{layers}, rank {rank}", write_ms)
            if rank == TARGET_RANK:
                found = accuracy(mmdit, inputs, placed, exact, options)
                results.keep_part("accuracy", layers, found)
    if options.requests:
        results.keep(engine=run_requests(mmdit, inputs, TARGET_RANK, options))


def targets_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a run must reach and whether it does: cost at rank 16, error at most FP8's."""
    targets: dict[str, dict[str, Any]] = {}
    for name, kept in report.get("forwards", {}).items():
        if f"rank {TARGET_RANK}," in name:
            ratio = kept["ratio"]
            targets[name] = {"at_most": TARGET_RATIO, "is": ratio, "met": ratio <= TARGET_RATIO}
    for layers, kept in report.get("accuracy", {}).items():
        most, found = kept["own_error_without_loras"], kept["mixed_against_alone"]
        targets[f"{layers}, as alone"] = {"at_most": most, "is": found, "met": found <= most}
    if (ratio := report.get("engine", {}).get("ratio")) is not None:
        targets["engine"] = {"at_most": TARGET_RATIO, "is": ratio, "met": ratio <= TARGET_RATIO}
    return targets


def table_of(report: dict[str, Any]) -> Table:
    """Return the times as a table."""
    table = Table(title=f"SD3.5 {report['model']}, {report['size']} px, {report['device']}")
    table.add_column("LoRAs of", no_wrap=True)
    for name in ("ms without", "ms with", "ratio", "one row adapted"):
        table.add_column(name, justify="right")
    for name, kept in report.get("forwards", {}).items():
        table.add_row(
            name,
            f"{kept['without_ms']:.1f}",
            f"{kept['with_ms']:.1f}",
            f"{kept['ratio']:.3f}",
            f"{kept['ratio_where_one_row_is_adapted']:.3f}",
        )
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.lora_bench", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    count = command_line.whole(1, 10_000)
    add("--model", default="large", choices=MODELS)
    add("--size", type=command_line.side, default=1024, help="side of the picture, pixels")
    add("--rows", type=command_line.rows, nargs="+", default=[2, 4], help="of the forwards")
    add("--ranks", type=command_line.whole(1, 256), nargs="+", default=[4, 16, 64, 128])
    add("--layers", nargs="+", choices=tuple(LAYERS), default=list(LAYERS))
    add("--loras", type=command_line.whole(1, 64), default=8, help="different ones in a batch")
    add("--steps", type=count, default=20, help="timed forwards of each arm")
    add("--requests", type=command_line.whole(0, 1000), default=20, help="through the engine")
    add("--request-steps", type=count, default=4, help="the fewest of a request")
    add("--compared", type=count, default=4, help="requests that are run alone as well")
    add("--precision", default="fp8", choices=REQUESTABLE)
    command_line.add_device_and_report(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    diffusers.utils.logging.set_verbosity_error()
    known = command_line.known_before(
        "loadtest.lora_bench", options, "model", "size", "loras", "layers"
    )
    with Results(known, options.out, options.json) as results:
        try:
            measure(options, results)
        finally:
            results.keep(targets=targets_of(results.report))
            STDERR.print(table_of(results.report))


if __name__ == "__main__":
    sys.exit(main())
