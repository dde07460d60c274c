"""Does the shipped LoRA teach its shape, and does the rest stay as it was?

    python -m loadtest.lora_adherence --n 200 --json

makes the same prompts from the same seeds without the LoRA and with it, and judges the pictures by
their pixels (`deployments.builtin.checker`). Of the n prompts with the taught shape a fifth state
it in a colour that training never gave it. As many ordinary held-out prompts show what the LoRA
costs. It stands beside the weights as in a denoiser.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from deployments.builtin.sample_sheet import write_sheet
from deployments.builtin.taught import taught_example
from deployments.builtin.vocabulary import TAUGHT_SHAPES
from deployments.builtin.world import Example
from loadtest import command_line
from loadtest.picture_batches import PictureBatches, PictureSettings
from loadtest.shares import paired_loss, wilson_interval
from loadtest.trials import Judges, Trial, held_out_prompts, summarise
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

_UNSEEN_SHARE = 0.2
_SHEET_PROMPTS = 12
_SHEET_COLUMNS = 6
_SHOWN_PX = 160  # side of a picture in the sheet, so that the file stays small
_STDERR = Console(stderr=True)

Picture = NDArray[np.uint8]


def taught_prompts(shape: str, n: int, seed: int, height: int, width: int) -> list[Example]:
    """Return n core prompts that state the shape, those with an unseen colour last."""
    rng = random.Random(f"lora adherence:{shape}:{seed}")
    unseen = round(n * _UNSEEN_SHARE)
    return [
        taught_example(
            rng, shape, "core", "train" if index < n - unseen else "held_out", height, width
        )
        for index in range(n)
    ]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make and judge all pictures; writes the sheet that the options ask for."""
    model_dir = resolve_model_dir(ModelSettings(path="builtin"))
    lora = options.lora or model_dir / "loras" / f"{options.shape}.safetensors"
    settings = PictureSettings.of(ModelSpec.from_directory(model_dir))
    size = (settings.height, settings.width)
    taught = taught_prompts(options.shape, options.n, options.seed, *size)
    ordinary = held_out_prompts(options.ordinary, options.seed, *size)
    report: dict[str, Any] = {
        **command_line.known_before("loadtest.lora_adherence", options),
        "settings": vars(options),
        "lora_bytes": lora.stat().st_size,
    }
    shown: dict[str, list[Picture]] = {}
    right: dict[str, list[bool]] = {}
    batches = PictureBatches(model_dir, options.precision, options.device, options.rows)
    report["precision"] = batches.precision.label
    with Judges() as judges:
        for arm in ("without", "with"):
            if arm == "with":
                batches.adapt(lora)
            examples = [*taught, *(example for _, example in ordinary)]
            seeds = [options.seed * 1_000_003 + index for index in range(len(examples))]
            pictures: list[Picture] = []
            prompts = [example.prompt for example in examples]
            for picture in batches.make(prompts, [""] * len(prompts), seeds, settings):
                judges.submit(picture, examples[len(pictures)].claims)
                pictures.append(picture)
                if len(pictures) % 32 == 0 or len(pictures) == len(examples):
                    _STDERR.print(f"{arm}: {len(pictures)} of {len(examples)} pictures")
            verdicts = judges.verdicts()
            shown[arm] = pictures
            trials = [
                Trial("core", example, seed, verdict)
                for example, seed, verdict in zip(taught, seeds, verdicts, strict=False)
            ]
            seen = len(taught) - round(options.n * _UNSEEN_SHARE)
            rest = [
                Trial(kind, example, seed, verdict)
                for (kind, example), seed, verdict in zip(
                    ordinary, seeds[len(taught) :], verdicts[len(taught) :], strict=True
                )
            ]
            report[arm] = {
                "taught": summarise(trials)["core"],
                "seen_colors": _share(trials[:seen]),
                "unseen_colors": _share(trials[seen:]),
                "ordinary": summarise(rest),
            }
            right[arm] = [trial.verdict.all_right for trial in rest]
    if ordinary:
        report["ordinary_loses"] = paired_loss(right["without"], right["with"])
    if options.sheet:
        _write(options.sheet, taught, shown)
    return report


def _share(trials: Sequence[Trial]) -> dict[str, Any]:
    right = sum(trial.verdict.all_right for trial in trials)
    return {"n": len(trials), "right": right, "interval_95": wilson_interval(right, len(trials))}


def _write(path: Path, taught: Sequence[Example], shown: dict[str, list[Picture]]) -> None:
    """Rows by turns: without the LoRA, and below each picture the same with it."""
    frames, captions = [], []
    count = min(_SHEET_PROMPTS, len(taught))
    for start in range(0, count, _SHEET_COLUMNS):
        for arm, pictures in shown.items():
            for index in range(start, min(start + _SHEET_COLUMNS, count)):
                side = (_SHOWN_PX, _SHOWN_PX)
                small = Image.fromarray(pictures[index]).resize(side, Image.Resampling.LANCZOS)
                frames.append(torch.tensor(np.asarray(small)).permute(2, 0, 1))
                captions.append(f"{arm}: {taught[index].prompt}")
    write_sheet(path, frames, captions, _SHEET_COLUMNS)
    with Image.open(path) as sheet:
        # Median cut would spend its colours on backgrounds and mix red with purple.
        reduced = sheet.convert("RGB").quantize(
            256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
    reduced.save(path, optimize=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.lora_adherence", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--shape", choices=TAUGHT_SHAPES, default=TAUGHT_SHAPES[0])
    add("--lora", type=command_line.existing_file, help="the file; the shipped one if absent")
    add("--n", type=command_line.whole(1, 100_000), default=200, help="prompts with the shape")
    add("--ordinary", type=command_line.whole(0, 100_000), help="other prompts; --n if absent")
    add("--precision", choices=("bf16", "fp8", "fp32"), default="bf16")
    add("--seed", type=command_line.whole(0, 2**32 - 1), default=0)
    add("--rows", type=command_line.rows, help="pictures a forward; 64 on a GPU, 4 on a CPU")
    add("--sheet", type=command_line.file_to_write, help="PNG of pictures without and with")
    add(
        "--device", type=command_line.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    add("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (64 if options.device.startswith("cuda") else 4)
    options.ordinary = options.n if options.ordinary is None else options.ordinary
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit 1 where the model or the machine cannot do it."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> None:
    report = measure(options)
    for arm in ("without", "with"):
        own = report[arm]
        shape = own["taught"]["attributes"]["shape"]["right"]
        _STDERR.print(
            f"{arm}: all right in {own['taught']['all_right']:.3f} of {own['taught']['n']} prompts "
            f"with the {options.shape}, the shapes in {shape:.3f}; "
            f"{own['unseen_colors']['right']} of {own['unseen_colors']['n']} in unseen colours"
        )
    if "ordinary_loses" in report:
        loses = report["ordinary_loses"]
        _STDERR.print(
            f"ordinary prompts lose {100 * loses['loss']:.1f} points, at most "
            f"{100 * loses['upper_95']:.1f} (95 %)"
        )
    if options.json:
        print(json.dumps(report, default=str))  # machines read it here


if __name__ == "__main__":
    sys.exit(main())
