"""Do pictures of the built-in model show what their prompts state?

    python -m loadtest.adherence --n 500 --json

draws held-out prompts (each states a combination that training never saw), makes one picture of
each in every precision from the same seeds, judges them by their pixels
(`deployments.builtin.checker`) and compares the precisions pair by pair. Three fifths of the
prompts are `core` (one or two objects), the rest `hard` (three or four objects, counts, words).

The shipped weights are FP8 on disk. `--reference DIR` takes the bf16 arm from another folder, with
the same model before quantisation; without it that arm has the shipped weights in bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from loadtest import command_line
from loadtest.picture_batches import PictureBatches, PictureSettings
from loadtest.shares import paired_loss
from loadtest.trials import Judges, Trial, held_out_prompts, summarise
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec
from serve.requests import GenerateRequest

_PRECISIONS = ("bf16", "fp8", "fp32")
MOST_PROMPTS = 100_000
_SEED_STRIDE = 1_000_003  # so that two seeds share no starting noise
_STDERR = Console(stderr=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make and judge all pictures."""
    model_dir = resolve_model_dir(ModelSettings(path=options.model))
    spec = ModelSpec.from_directory(model_dir, None)
    # The model's own limits, refused as a request would be.
    spec.resolve(GenerateRequest(prompt="a", width=options.width, height=options.height))
    settings = PictureSettings.of(spec)
    settings = replace(
        settings,
        width=options.width or settings.width,
        height=options.height or settings.height,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale or settings.guidance_scale,
        guidance_interval=options.guidance_interval,
    )
    arms: dict[str, list[Trial]] = {}
    report: dict[str, Any] = {
        **command_line.known_before("loadtest.adherence", options),
        "model": spec.name,
        "settings": vars(options)
        | {"guidance_scale": settings.guidance_scale, "size": [settings.width, settings.height]},
        "arms": {},
    }
    with Judges() as judges:
        for precision in options.precision:
            unquantised = options.reference and precision != "fp8"
            folder = options.reference if unquantised else model_dir
            began = time.monotonic()
            batches = PictureBatches(folder, precision, options.device, options.rows)
            pictures, arms[precision] = _trials(batches, judges, precision, settings, options)
            report["arms"][precision] = {
                "precision": batches.precision.label,
                "weights": "unquantised" if folder != model_dir else "as shipped",
                "seconds": time.monotonic() - began,
                "denoise_ms_a_picture": 1000 * batches.denoise_seconds / options.n,
                **summarise(arms[precision]),
            }
            if options.pictures:
                _save(options.pictures / precision, pictures, arms[precision])
    if {"bf16", "fp8"} <= arms.keys():
        report["fp8_against_bf16"] = _compared(arms["bf16"], arms["fp8"])
    return report


def _trials(
    batches: PictureBatches,
    judges: Judges,
    precision: str,
    settings: PictureSettings,
    options: argparse.Namespace,
) -> tuple[list[NDArray[np.uint8]], list[Trial]]:
    chosen = held_out_prompts(options.n, options.seed, settings.height, settings.width)
    prompts = [example.prompt for _, example in chosen]
    seeds = [options.seed * _SEED_STRIDE + index for index in range(options.n)]
    pictures: list[NDArray[np.uint8]] = []
    for picture, (_, example) in zip(
        batches.make(prompts, [""] * options.n, seeds, settings), chosen, strict=True
    ):
        judges.submit(picture, example.claims)
        pictures.append(picture)
        if len(pictures) % options.rows == 0 or len(pictures) == options.n:
            _STDERR.print(f"{precision}: {len(pictures)} of {options.n} pictures")
    verdicts = judges.verdicts()
    trials = [
        Trial(kind, example, seed, verdict)
        for (kind, example), seed, verdict in zip(chosen, seeds, verdicts, strict=True)
    ]
    return pictures, trials


def _compared(reference: Sequence[Trial], other: Sequence[Trial]) -> dict[str, Any]:
    compared = {}
    for kind in ("all", "core", "hard"):
        rights = [
            [trial.verdict.all_right for trial in trials if kind in ("all", trial.kind)]
            for trials in (reference, other)
        ]
        if rights[0]:
            compared[kind] = paired_loss(*rights)
    return compared


def _save(folder: Path, pictures: Sequence[NDArray[np.uint8]], trials: Sequence[Trial]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (picture, trial) in enumerate(zip(pictures, trials, strict=True)):
        name = f"{index:04d}.png"
        Image.fromarray(picture).save(folder / name)
        lines.append(
            {
                "file": name,
                "kind": trial.kind,
                "prompt": trial.example.prompt,
                "seed": trial.seed,
                "attributes": trial.verdict.attributes,
                "seen": trial.verdict.seen,
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "verdicts.jsonl").write_text(text, encoding="utf-8")


def table_of(report: dict[str, Any]) -> Table:
    """Return the shares as a table, an arm a column."""
    table = Table(title=f"{report['model']} on {report['device']}: held-out prompts, share right")
    table.add_column("kind")
    table.add_column("stated")
    table.add_column("n", justify="right")
    arms = list(report["arms"].values())
    for name, arm in report["arms"].items():
        table.add_column(f"{name}\n{arm['precision']}", justify="right")
    for kind in ("core", "hard"):
        if kind not in arms[0]:
            continue
        shares = [f"{arm[kind]['all_right']:.3f}" for arm in arms]
        table.add_row(kind, "all that is stated", str(arms[0][kind]["n"]), *shares, style="bold")
        for group in ("by_content", "attributes"):
            for name, first in arms[0][kind][group].items():
                shares = [f"{arm[kind][group][name]['right']:.3f}" for arm in arms]
                table.add_row("", name, str(first["n"]), *shares)
            table.add_section()
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.adherence", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--n", type=command_line.whole(1, MOST_PROMPTS), default=500, help="prompts")
    add("--model", default="builtin", help="`builtin` or a folder in Diffusers layout")
    add(
        "--reference",
        type=command_line.existing_folder,
        help="folder of the same model before quantisation, for arms not fp8",
    )
    add("--precision", default="bf16,fp8", help="arms, comma-separated")
    add("--num-inference-steps", type=command_line.whole(1, 200), default=20)
    add(
        "--guidance-scale",
        type=command_line.number(1, 100),
        help="above 1; the model's own if absent",
    )
    add(
        "--guidance-interval",
        type=command_line.number(0, 1),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels outside of which there is no guidance; guides every step if absent",
    )
    pixels = "pixels, a multiple of 16; the model's own if absent"
    add("--width", type=command_line.side, help=pixels)
    add("--height", type=command_line.side, help="likewise")
    add("--seed", type=command_line.whole(0, 2**32 - 1), default=0)
    add("--rows", type=command_line.rows, help="pictures a forward; 64 on a GPU, 4 on a CPU")
    add(
        "--device", type=command_line.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    add(
        "--pictures",
        type=command_line.folder_to_fill,
        help="folder for the pictures and their verdicts",
    )
    add("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (64 if options.device.startswith("cuda") else 4)
    options.precision = options.precision.split(",")
    if unknown := set(options.precision) - set(_PRECISIONS):
        parser.error(f"--precision: {', '.join(unknown)}; known are {', '.join(_PRECISIONS)}")
    if options.guidance_scale is not None and not options.guidance_scale > 1:
        parser.error("--guidance-scale: above 1")
    if options.guidance_interval is not None:
        low, high = options.guidance_interval = tuple(options.guidance_interval)
        if not 0 <= low < high <= 1:
            parser.error("--guidance-interval: two numbers from 0 to 1, the lower first")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    report = measure(options)
    _STDERR.print(table_of(report))
    for kind, values in report.get("fp8_against_bf16", {}).items():
        _STDERR.print(
            f"FP8 against bf16, {kind}: loses {100 * values['loss']:.1f} points, "
            f"at most {100 * values['upper_95']:.1f} (95 %)"
        )
    if options.json:
        print(json.dumps(report, default=str))  # noqa: T201 - machines read it here


if __name__ == "__main__":
    sys.exit(main())
