"""Do pictures of the built-in model show what their prompts state?

    python -m loadtest.adherence --n 500 --json

draws held-out prompts (each states a combination that training never saw), makes one picture of
each in every precision from the same seeds, judges them by their pixels
(`deployments.builtin.checker`) and compares the precisions pair by pair. Three fifths of the
prompts are `core` (one or two objects), the rest `hard` (three or four objects, counts, words).
The first precision also draws as many prompts of combinations that training has seen
(`loadtest.seen_combinations`). `--negative` measures negative prompts instead, at guidance scales
from 1 to 8 (`loadtest.negative_prompts`).

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
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from deployments.builtin.world import Example
from loadtest import command_line, negative_prompts
from loadtest.adherence_arguments import MOST_PROMPTS as MOST_PROMPTS
from loadtest.adherence_arguments import parse_arguments as parse_arguments
from loadtest.picture_batches import PictureBatches, PictureSettings
from loadtest.seen_combinations import against_seen, seen_prompts
from loadtest.shares import paired_loss
from loadtest.trials import Judges, PromptKind, Trial, held_out_prompts, summarise
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec
from serve.requests import GenerateRequest

_SEED_STRIDE = 1_000_003  # so that two seeds share no starting noise
_STDERR = Console(stderr=True)


def _chosen(options: argparse.Namespace) -> tuple[Path, PictureSettings, dict[str, Any]]:
    """Return the model's folder, the settings of pictures, and what a report begins with."""
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
    report: dict[str, Any] = {
        **command_line.known_before("loadtest.adherence", options),
        "model": spec.name,
        "settings": vars(options)
        | {"guidance_scale": settings.guidance_scale, "size": [settings.width, settings.height]},
    }
    return model_dir, settings, report


def measure_negative(options: argparse.Namespace) -> dict[str, Any]:
    """Make and look at pictures with and without negative prompts, in the first precision."""
    model_dir, settings, report = _chosen(options)
    precision = options.precision[0]
    batches = PictureBatches(model_dir, precision, options.device, options.rows)
    scales: Sequence[float] = negative_prompts.GUIDANCE_SCALES
    report["settings"]["guidance_scale"] = list(scales)
    if options.guidance_scale:
        scales = (options.guidance_scale,)
        report["settings"]["guidance_scale"] = options.guidance_scale
    first_seed = options.seed * _SEED_STRIDE
    report["precision"] = batches.precision.label
    report["negative"] = negative_prompts.measure(
        batches, settings, options.n, first_seed, scales, _STDERR.print
    )
    return report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make and judge all pictures."""
    model_dir, settings, report = _chosen(options)
    arms: dict[str, list[Trial]] = {}
    report["arms"] = {}
    held_out = held_out_prompts(options.n, options.seed, settings.height, settings.width)
    first_seed = options.seed * _SEED_STRIDE
    with Judges() as judges:
        for precision in options.precision:
            unquantised = options.reference and precision != "fp8"
            folder = options.reference if unquantised else model_dir
            began = time.monotonic()
            batches = PictureBatches(folder, precision, options.device, options.rows)
            pictures, arms[precision] = _trials(batches, judges, held_out, first_seed, settings)
            report["arms"][precision] = {
                "precision": batches.precision.label,
                "weights": "unquantised" if folder != model_dir else "as shipped",
                "seconds": time.monotonic() - began,
                "denoise_ms_a_picture": 1000 * batches.denoise_seconds / options.n,
                **summarise(arms[precision]),
            }
            if options.pictures:
                _save(options.pictures / precision, pictures, arms[precision])
            if options.seen and len(arms) == 1:
                others = seen_prompts(options.seen, options.seed, settings.height, settings.width)
                pictures, trials = _trials(batches, judges, others, first_seed, settings)
                compared = against_seen(arms[precision], trials)
                report["held_out_against_seen"] = {"arm": precision, **compared}
                if options.pictures:
                    _save(options.pictures / f"{precision}_seen", pictures, trials)
    if {"bf16", "fp8"} <= arms.keys():
        report["fp8_against_bf16"] = _compared(arms["bf16"], arms["fp8"])
    return report


def _trials(
    batches: PictureBatches,
    judges: Judges,
    chosen: Sequence[tuple[PromptKind, Example]],
    first_seed: int,
    settings: PictureSettings,
) -> tuple[list[NDArray[np.uint8]], list[Trial]]:
    n = len(chosen)
    prompts = [example.prompt for _, example in chosen]
    seeds = [first_seed + index for index in range(n)]
    pictures: list[NDArray[np.uint8]] = []
    for picture, (_, example) in zip(
        batches.make(prompts, [""] * n, seeds, settings), chosen, strict=True
    ):
        judges.submit(picture, example.claims)
        pictures.append(picture)
        if len(pictures) % batches.rows == 0 or len(pictures) == n:
            _STDERR.print(f"{batches.precision.label}: {len(pictures)} of {n} pictures")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    if options.negative:
        report = measure_negative(options)
        _STDERR.print(negative_prompts.table_of(report))
    else:
        report = measure(options)
        _STDERR.print(table_of(report))
    for kind, values in report.get("held_out_against_seen", {}).items():
        if kind != "arm":
            _STDERR.print(
                f"held-out against seen combinations, {kind}: {values['held_out']['right']:.3f}, "
                f"{values['seen']['right']:.3f}; {100 * values['loss']:.1f} points less "
                f"({100 * values['interval_95'][0]:.1f} to {100 * values['interval_95'][1]:.1f})"
            )
    for kind, values in report.get("fp8_against_bf16", {}).items():
        _STDERR.print(
            f"FP8 against bf16, {kind}: loses {100 * values['loss']:.1f} points, "
            f"at most {100 * values['upper_95']:.1f} (95 %)"
        )
    if options.json:
        print(json.dumps(report, default=str))  # machines read it here


if __name__ == "__main__":
    sys.exit(main())
