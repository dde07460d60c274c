"""Command line of `loadtest.adherence`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from loadtest import command_line

MOST_PROMPTS = 100_000
_PRECISIONS = ("bf16", "fp8", "fp32")
_PROMPTS, _NEGATIVE_PROMPTS = 500, 100
_WHAT = "Do pictures of the built-in model show what their prompts state?"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this measurement."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.adherence", description=_WHAT)
    add = parser.add_argument
    add(
        "--n",
        type=command_line.whole(1, MOST_PROMPTS),
        help=f"prompts; {_PROMPTS}, or {_NEGATIVE_PROMPTS} with --negative, if absent",
    )
    add(
        "--seen",
        type=command_line.whole(0, MOST_PROMPTS),
        help="prompts of seen combinations, in the first precision; as many as --n if absent",
    )
    add("--negative", action="store_true", help="measure negative prompts, and nothing else")
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
        help="above 1; if absent the model's own, or several with --negative",
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
    options.n = options.n or (_NEGATIVE_PROMPTS if options.negative else _PROMPTS)
    options.seen = options.n if options.seen is None else options.seen
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
