"""Does a negative prompt take away what it names?

    python -m loadtest.negative_prompts --json

makes pictures of prompts that leave the colour open, three times from the same seeds: without a
negative prompt, with `red`, and with the colour that the first picture came out in. The last is
where a negative prompt has something to take away; the second says how often a colour changes
merely because another negative prompt was given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from deployments.builtin.vocabulary import COLORS, SHAPES
from deployments.builtin.world import check, read_claims
from loadtest.picture_batches import PictureBatches, PictureSettings
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

_NAMED = "red"
Picture = NDArray[np.uint8]


def open_prompts(n: int) -> list[str]:
    """Return n prompts that state a shape and no colour, the shapes in turn."""
    return [f"a {SHAPES[index % len(SHAPES)]}" for index in range(n)]


@dataclass(frozen=True)
class Shown:
    """What one picture shows: the colours of its things, and whether its prompt holds."""

    colors: frozenset[str]
    prompt_holds: bool


def shown(picture: Picture, prompt: str) -> Shown:
    """Look at a picture, uint8 [height, width, 3]."""
    colors = {color for color in COLORS if check(picture, read_claims(color)).all_right}
    return Shown(frozenset(colors), check(picture, read_claims(prompt)).all_right)


def first_color(before: Shown) -> str:
    """Return the first of a picture's colours, by the alphabet; red where it shows none."""
    return min(before.colors, default=_NAMED)


def compare(
    without: Sequence[Shown], named: Sequence[Shown], own: Sequence[Shown]
) -> dict[str, Any]:
    """Count what changed; all three by the same prompts and seeds.

    Args:
        without: Pictures without a negative prompt.
        named: With `red` as the negative prompt.
        own: With the `first_color` of the same picture in `without`.
    """
    colored = [index for index, before in enumerate(without) if before.colors]
    others = [index for index in colored if _NAMED not in without[index].colors]

    def kept(after: Sequence[Shown], indices: Sequence[int]) -> int:
        return sum(first_color(without[index]) in after[index].colors for index in indices)

    return {
        "n": len(without),
        "prompt_holds": {
            "without": sum(picture.prompt_holds for picture in without),
            "negative_red": sum(picture.prompt_holds for picture in named),
            "negative_own_color": sum(picture.prompt_holds for picture in own),
        },
        "red": {
            "without": sum(_NAMED in picture.colors for picture in without),
            "negative_red": sum(_NAMED in picture.colors for picture in named),
        },
        "color_kept": {
            "negative_own_color": {"n": len(colored), "kept": kept(own, colored)},
            "negative_red_where_not_red": {"n": len(others), "kept": kept(named, others)},
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.negative_prompts", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--n", type=int, default=40, help="prompts")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rows", type=int, default=4, help="pictures a forward")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="JSON on standard output")
    options = parser.parse_args()
    if options.n < 1 or options.rows < 1:
        parser.error("--n and --rows: at least 1")
    model_dir = resolve_model_dir(ModelSettings(path="builtin"))
    settings = PictureSettings.of(ModelSpec.from_directory(model_dir))
    batches = PictureBatches(model_dir, options.precision, options.device, options.rows)
    prompts, seeds = open_prompts(options.n), range(options.n)

    def look(negative_prompts: Sequence[str]) -> list[Shown]:
        pictures = batches.make(prompts, negative_prompts, seeds, settings)
        return [shown(*pair) for pair in zip(pictures, prompts, strict=True)]

    without = look([""] * options.n)
    named = look([_NAMED] * options.n)
    own = look([first_color(before) for before in without])
    report = {"precision": batches.precision.label, **compare(without, named, own)}
    Console(stderr=True).print(report)
    if options.json:
        print(json.dumps(report))  # noqa: T201 - machines read it here


if __name__ == "__main__":
    main()
