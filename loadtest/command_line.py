"""What the measurements' command lines share: arguments that are checked, errors told in words.

A measurement costs a card's minutes, so what cannot work is refused before a model is made: by
argparse (exit 2) where the argument alone is wrong, by a typed error (exit 1) where it does not fit
the model or the machine.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loadtest.overhead import machine
from serve.commands.output import write_error
from serve.errors import ConfigurationError, InvalidRequest, KelvinError

MOST_ROWS = 64
LONGEST_SECONDS = 3600.0
LARGEST_SIDE = 2048  # pixels
_SIDE_STEP = 16
_PIXELS_A_LATENT = 8


def add_device_and_report(parser: argparse.ArgumentParser) -> None:
    """Add where a measurement runs, and where its report goes."""
    add = parser.add_argument
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=file_to_write, help="file that holds the report after every phase")
    add("--json", action="store_true", help="JSON on standard output")


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return an argument's type: a whole number within bounds, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{_cut(text)}: a whole number, {least} to {most}")
        return value

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """Return an argument's type: a finite number within bounds, both included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{_cut(text)}: a number, {least:g} to {most:g}")
        return value

    return parse


rows = whole(1, MOST_ROWS)
"""Of one forward."""

seconds = number(0.0, LONGEST_SECONDS)


def side(text: str) -> int:
    """An argument's type: a side of a picture in pixels."""
    value = whole(_SIDE_STEP, LARGEST_SIDE)(text)
    if value % _SIDE_STEP:
        raise argparse.ArgumentTypeError(f"{value}: a multiple of {_SIDE_STEP}")
    return value


def device(text: str) -> str:
    """An argument's type: `cpu`, or `cuda` or `cuda:N` where this machine has that card."""
    try:
        known = torch.device(text)
    except RuntimeError:
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{_cut(text)}: cpu, cuda or cuda:N")
    if known.type == "cuda" and (known.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text}: this machine has {torch.cuda.device_count()} usable NVIDIA GPUs; or cpu"
        )
    return text


def existing_folder(text: str) -> Path:
    """An argument's type: a folder to read."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{_cut(text)}: no such folder")
    return Path(text)


def existing_file(text: str) -> Path:
    """An argument's type: a file to read."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{_cut(text)}: no such file")
    return Path(text)


def file_to_write(text: str) -> Path:
    """An argument's type: a file, new or not, in a folder that exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{_cut(text)}: its folder does not exist")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{_cut(text)}: not a file that can be written")
    return path


def folder_to_fill(text: str) -> Path:
    """An argument's type: a folder that exists, or a new one in a folder that does."""
    path = Path(text)
    try:
        # Tried, because permissions alone do not tell: nobody makes folders in /proc.
        path.mkdir()
        path.rmdir()
    except FileExistsError:
        if not path.is_dir() or not os.access(path, os.W_OK):
            raise argparse.ArgumentTypeError(f"{_cut(text)}: not a folder to write in") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise argparse.ArgumentTypeError(
            f"{_cut(text)}: cannot be made ({reason}); a folder in one that exists"
        ) from None
    return path


def check_side(pixels: int, largest_latents: int) -> None:
    """Refuse a picture that the model has no positions for.

    Args:
        pixels: Its longer side.
        largest_latents: Side of the model's table of positions, in latents.

    Raises:
        InvalidRequest: It is larger.
    """
    largest = min(LARGEST_SIDE, largest_latents * _PIXELS_A_LATENT)
    if pixels > largest:
        raise InvalidRequest(
            "The model cannot make so large a picture.",
            field="size",
            value=pixels,
            allowed=f"a multiple of {_SIDE_STEP}, at most {largest}",
        )


def command_of(module: str) -> str:
    """Return the command line that this process was started with, for a report."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def known_before(module: str, options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return what a report begins with: command, device, torch, and the options so named."""
    on_gpu = options.device.startswith("cuda")
    return {
        "command": command_of(module),
        "device": torch.cuda.get_device_name(options.device) if on_gpu else machine()["cpu"],
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in names},
    }


def run_in_words(run: Callable[[argparse.Namespace], int | None], options: Any) -> int:
    """Run a measurement; what it cannot do is told in words on standard error, with exit code 1."""
    try:
        return run(options) or 0
    except KelvinError as error:
        write_error(error, as_json=False)
    except torch.OutOfMemoryError as error:
        told = ConfigurationError(
            "The card's memory does not suffice.",
            value=str(error),
            allowed="fewer rows, a smaller size or model, or a card that nobody else uses",
        )
        write_error(told, as_json=False)
    return 1


def _cut(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "…")
