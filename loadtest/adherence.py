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
import math
import os
import platform
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from deployments.builtin.world import Claims, Example, Verdict, check, sample_example
from loadtest.picture_batches import PictureBatches, PictureSettings
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

_CORE_SHARE = 0.6
_Z_95 = 1.959964  # two-sided
_Z_95_ONE_SIDED = 1.644854
_STDERR = Console(stderr=True)


@dataclass(frozen=True)
class Trial:
    """One prompt and what the picture of it was found to show."""

    kind: str
    example: Example
    seed: int
    verdict: Verdict


def held_out_prompts(n: int, seed: int, height: int, width: int) -> list[tuple[str, Example]]:
    """Return n (kind, example) pairs that do not depend on anything but the arguments."""
    rng = random.Random(f"adherence:{seed}")
    core = round(n * _CORE_SHARE)
    kinds = ["core"] * core + ["hard"] * (n - core)
    return [
        (kind, sample_example(rng, "core" if kind == "core" else "hard", "held_out", height, width))
        for kind in kinds
    ]


def judge(pictures: Sequence[NDArray[np.uint8]], claims: Sequence[Claims]) -> list[Verdict]:
    """Check pictures on all cores."""
    workers = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check, pictures, claims, chunksize=8))


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return middle - reach, middle + reach


def paired_loss(reference: Sequence[bool], other: Sequence[bool]) -> dict[str, float]:
    """Loss of `other` against `reference` over the same prompts and seeds.

    Returns:
        `loss` (share of prompts lost, net) and `upper_95`, its one-sided 95 % bound from the
        spread of the paired differences; both as fractions.
    """
    differences = np.array(reference, dtype=float) - np.array(other, dtype=float)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    loss = float(differences.mean())
    return {"loss": loss, "upper_95": loss + _Z_95_ONE_SIDED * error}


def summarise(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return shares of prompts all right, by kind, and of attributes, over all prompts."""
    report: dict[str, Any] = {}
    for kind in ("core", "hard"):
        right = [trial.verdict.all_right for trial in trials if trial.kind == kind]
        low, high = wilson_interval(sum(right), len(right))
        report[kind] = {
            "n": len(right),
            "all_right": sum(right) / max(1, len(right)),
            "interval_95": [low, high],
        }
        attributes: dict[str, list[bool]] = {}
        for trial in trials:
            if trial.kind == kind:
                for name, holds in trial.verdict.attributes.items():
                    attributes.setdefault(name, []).append(holds)
        report[kind]["attributes"] = {
            name: {"n": len(holds), "right": sum(holds) / len(holds)}
            for name, holds in sorted(attributes.items())
        }
    return report


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make and judge all pictures."""
    model_dir = resolve_model_dir(ModelSettings(path=options.model))
    spec = ModelSpec.from_directory(model_dir, None)
    settings = PictureSettings(
        width=spec.defaults.width,
        height=spec.defaults.height,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale or spec.defaults.guidance_scale,
        shift=spec.defaults.shift,
        sampler="euler",
        max_sequence_length=spec.defaults.max_sequence_length,
    )
    chosen = held_out_prompts(options.n, options.seed, settings.height, settings.width)
    seeds = [options.seed * 1_000_003 + index for index in range(options.n)]
    arms: dict[str, list[Trial]] = {}
    report: dict[str, Any] = {
        "command": "python -m loadtest.adherence "
        f"--n {options.n} --num-inference-steps {options.num_inference_steps}",
        "device": torch.cuda.get_device_name()
        if options.device.startswith("cuda")
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "model": spec.name,
        "settings": vars(options) | {"guidance_scale": settings.guidance_scale},
        "arms": {},
    }
    for precision in options.precision.split(","):
        folder = Path(options.reference) if options.reference and precision != "fp8" else model_dir
        began = time.monotonic()
        batches = PictureBatches(folder, precision, options.device, options.rows)
        prompts = [example.prompt for _, example in chosen]
        pictures = []
        for picture in batches.make(prompts, [""] * options.n, seeds, settings):
            pictures.append(picture)
            if len(pictures) % options.rows == 0 or len(pictures) == options.n:
                _STDERR.print(f"{precision}: {len(pictures)} of {options.n} pictures")
        verdicts = judge(pictures, [example.claims for _, example in chosen])
        arms[precision] = [
            Trial(kind, example, seed, verdict)
            for (kind, example), seed, verdict in zip(chosen, seeds, verdicts, strict=True)
        ]
        report["arms"][precision] = {
            "precision": batches.precision.label,
            "weights": "unquantised" if folder != model_dir else "as shipped",
            "seconds": time.monotonic() - began,
            **summarise(arms[precision]),
        }
        if options.pictures:
            _save(Path(options.pictures) / precision, pictures, arms[precision])
    if {"bf16", "fp8"} <= arms.keys():
        report["fp8_against_bf16"] = {
            kind: paired_loss(
                *(
                    [t.verdict.all_right for t in arms[arm] if kind in ("all", t.kind)]
                    for arm in ("bf16", "fp8")
                )
            )
            for kind in ("all", "core", "hard")
        }
    return report


def _save(folder: Path, pictures: Sequence[NDArray[np.uint8]], trials: Sequence[Trial]) -> None:
    from PIL import Image

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


def print_table(report: dict[str, Any]) -> None:
    """Print the shares, an arm a column."""
    table = Table(title=f"{report['model']} on {report['device']}: held-out prompts, share right")
    table.add_column("kind")
    table.add_column("attribute")
    table.add_column("n", justify="right")
    arms = report["arms"]
    for arm, values in arms.items():
        table.add_column(f"{arm}\n{values['precision']}", justify="right")
    first = next(iter(arms.values()))
    for kind in ("core", "hard"):
        shares = [f"{arm[kind]['all_right']:.3f}" for arm in arms.values()]
        table.add_row(kind, "all stated", str(first[kind]["n"]), *shares, style="bold")
        for name, values in first[kind]["attributes"].items():
            row = [f"{arm[kind]['attributes'][name]['right']:.3f}" for arm in arms.values()]
            table.add_row("", name, str(values["n"]), *row)
    _STDERR.print(table)
    for kind, values in report.get("fp8_against_bf16", {}).items():
        _STDERR.print(
            f"FP8 against bf16, {kind}: loses {100 * values['loss']:.1f} points, "
            f"at most {100 * values['upper_95']:.1f} (95 %)"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.adherence", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--n", type=int, default=500, help="prompts")
    add("--model", default="builtin", help="`builtin` or a folder in Diffusers layout")
    add("--reference", help="folder of the same model before quantisation, for arms not fp8")
    add("--precision", default="bf16,fp8", help="arms, comma-separated")
    add("--num-inference-steps", type=int, default=20)
    add("--guidance-scale", type=float, help="the model's own if absent")
    add("--seed", type=int, default=0)
    add("--rows", type=int, default=None, help="pictures a forward; 64 on a GPU, 4 on a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--pictures", help="folder for the pictures and their verdicts")
    add("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args()
    options.rows = options.rows or (64 if options.device.startswith("cuda") else 4)
    report = measure(options)
    print_table(report)
    if options.json:
        print(json.dumps(report))  # noqa: T201 - machines read it here


if __name__ == "__main__":
    main()
