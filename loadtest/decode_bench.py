"""Decoding large pictures: time, and memory by the allocator against what was planned.

    python -m loadtest.decode_bench --json

The VAE has SD3.5's configuration and random weights. `served` decodes as a replica does by default,
in tiles where 3 GiB do not hold the picture, but not compiled; `whole` is the same decoder with
tiling off, and is left out where it runs out of memory; `compiled` is what a replica prepares, on a
GPU for sizes that it decodes whole. Their pictures are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.sd3.decode_plan import TilingSettings
from deployments.sd3.precision import choose_precision
from deployments.sd3.vae import VaeDecoder
from loadtest import command_line
from loadtest.results import Results
from loadtest.stage_memory import GIB, REAL, TINY, random_decoder

_SIZES = (1024, 1536, 2048)
MOST_GIB = 3.0
"""At 2048x2048 and below, the VAE's weights included."""


def measure(options: argparse.Namespace, results: Results) -> None:
    """Decode each size in each arm; each is kept as soon as it is measured."""
    device = torch.device(options.device)
    precision = choose_precision("bf16" if device.type == "cuda" else "fp32", device)
    generator = torch.Generator(device).manual_seed(0)
    sizes = TINY if options.tiny else REAL
    decoder = random_decoder(device, precision, sizes["vae"], generator)
    results.keep(precision=precision.label, resident_gib=decoder.resident_bytes / GIB)
    memory_bytes = int(options.memory_gib * GIB)
    for side in options.sizes:
        # Uneven on purpose: tiles that were normalised by themselves would differ.
        latents = torch.randn(decoder.channels, side // 8, side // 8) + torch.linspace(
            -2, 2, side // 8
        )
        decoder.tiling = TilingSettings(options.tiling, memory_bytes)
        served, report = _decoded(decoder, latents, options.repeats)
        results.keep_part("served", str(side), report)
        _measure_compiled(decoder, latents, served, options.repeats, results)
        decoder.tiling = TilingSettings("off")
        try:
            whole, report = _decoded(decoder, latents, options.repeats)
        except torch.OutOfMemoryError:
            results.keep_part("whole", str(side), "out of memory")
            continue
        report |= _differences(whole, served)
        results.keep_part("whole", str(side), report)


def _measure_compiled(
    decoder: VaeDecoder,
    latents: torch.Tensor,
    plain: NDArray[np.uint8],
    repeats: int,
    results: Results,
) -> None:
    """Prepare the size as a replica does at start-up, decode, and go back to plain decoding."""
    side = str(latents.shape[-1] * 8)
    prepared = decoder.prepare(*latents.shape[1:])
    if prepared is None or not prepared.is_compiled:
        why = "in tiles, or no GPU" if prepared is None else prepared.reason
        results.keep_part("compiled", side, why)
    else:
        picture, report = _decoded(decoder, latents, repeats)
        report |= {
            "prepare_s": prepared.seconds,
            "decoder_alone_ms": {"plain": prepared.plain_ms, "compiled": prepared.compiled_ms},
            **_differences(picture, plain),
        }
        results.keep_part("compiled", side, report)
    decoder.compiled = None


def _differences(picture: NDArray[np.uint8], served: NDArray[np.uint8]) -> dict[str, Any]:
    difference = np.abs(served.astype(np.int16) - picture)
    return {
        "mean_difference_from_served": float(difference.mean()),  # of 255
        "largest_difference_from_served": int(difference.max()),
    }


def _decoded(
    decoder: VaeDecoder, latents: torch.Tensor, repeats: int
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Decode once to warm up and then some times more; return the picture and what it took."""
    device = decoder.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    plan = decoder.plan(*latents.shape[1:])
    took = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        picture = decoder.decode(latents)  # ends on the host
        took.append(1000 * (time.perf_counter() - began))
    report: dict[str, Any] = {
        "tile": plan.tile,
        "on_host": plan.on_host,
        "planned_gib": (plan.device_bytes + decoder.resident_bytes) / GIB,
        "ms": statistics.median(took[1:]),
    }
    if device.type == "cuda":
        report["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        report["peak_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return picture, report


def targets_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return what was promised, what is, and whether it holds; on a GPU only for memory."""
    targets: dict[str, Any] = {}
    for side, served in report.get("served", {}).items():
        if (peak := served.get("peak_gib")) is not None:
            for name, most in (("peak_gib", MOST_GIB), ("peak_by_plan_gib", served["planned_gib"])):
                targets[f"{side}/{name}"] = {"at_most": most, "is": peak, "met": peak <= most}
    for arm, name in (("whole", "difference"), ("compiled", "compiled_difference")):
        for side, told in report.get(arm, {}).items():
            if isinstance(told, dict):
                mean = told["mean_difference_from_served"]
                targets[f"{side}/{name}"] = {"at_most": 1.0, "is": mean, "met": mean <= 1.0}
    for side, told in report.get("compiled", {}).items():
        if isinstance(told, dict):
            most, ms, peak = report["served"][side]["ms"], told["ms"], told["peak_gib"]
            targets[f"{side}/compiled_ms"] = {"at_most": most, "is": ms, "met": ms < most}
            planned = told["planned_gib"]
            fits = {"at_most": planned, "is": peak, "met": peak <= planned}
            targets[f"{side}/compiled_peak_by_plan_gib"] = fits
    return targets


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return checked options."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.decode_bench", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--sizes", type=command_line.side, nargs="+", default=_SIZES, help="sides in pixels")
    add("--memory-gib", type=command_line.number(0.3, 80.0), default=MOST_GIB)
    add("--tiling", choices=("auto", "always"), default="auto", help="of `served`")
    add("--repeats", type=command_line.whole(1, 100), default=5)
    add("--tiny", action="store_true", help="few channels, to try the benchmark itself")
    command_line.add_device_and_report(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    known = command_line.known_before("loadtest.decode_bench", options, "sizes", "memory_gib")
    with Results(known, options.out, options.json) as results:
        try:
            measure(options, results)
        finally:
            results.keep(targets=targets_of(results.report))


if __name__ == "__main__":
    sys.exit(main())
