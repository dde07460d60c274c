"""Does a negative prompt take away what it names? `python -m loadtest.adherence --negative`.

Makes pictures of prompts that leave the colour open, three times from the same seeds: without a
negative prompt, with `red`, and with the colour that the first picture came out in. One picture in
eleven is red by itself, so the last is where most negative prompts have something to take away;
the second also says how often a colour changes merely because another negative prompt was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from deployments.builtin.attributes import MINIMUM_PURITY
from deployments.builtin.seen import see
from deployments.builtin.vocabulary import SHAPES
from deployments.builtin.world import check, read_claims
from loadtest.picture_batches import PictureBatches, PictureSettings
from loadtest.shares import wilson_interval

NAMED = "red"
GUIDANCE_SCALES = (1.0, 2.0, 4.0, 6.0, 8.0)
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
    _, things = see(picture)
    colors = {thing.color for thing in things if thing.purity >= MINIMUM_PURITY}
    return Shown(frozenset(colors), check(picture, read_claims(prompt)).all_right)


def first_color(before: Shown) -> str:
    """Return the first of a picture's colours, by the alphabet; red where it shows none."""
    return min(before.colors, default=NAMED)


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
    reds = [index for index in colored if NAMED in without[index].colors]
    others = [index for index in colored if NAMED not in without[index].colors]

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
            "without": len(reds),
            "negative_red": sum(NAMED in picture.colors for picture in named),
        },
        "no_red_under_negative_red": _share(
            sum(NAMED not in picture.colors for picture in named), len(named)
        ),
        "red_removed": _share(sum(NAMED not in named[index].colors for index in reds), len(reds)),
        "own_color_removed": _share(len(colored) - kept(own, colored), len(colored)),
        "other_color_kept_under_negative_red": _share(kept(named, others), len(others)),
    }


def _share(count: int, n: int) -> dict[str, Any]:
    interval = list(wilson_interval(count, n))
    return {"n": n, "count": count, "share": count / n if n else None, "interval_95": interval}


def measure(
    batches: PictureBatches,
    settings: PictureSettings,
    n: int,
    first_seed: int,
    guidance_scales: Sequence[float],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return `compare` for n prompts at each guidance scale, by its text.

    At a scale of 1 the negative prompt has no weight, so its pictures are those without one.

    Args:
        batches: The model.
        settings: Of all pictures, but for the guidance scale.
        n: Prompts.
        first_seed: Of the first prompt; the others count up.
        guidance_scales: At least 1 each.
        tell: Takes a line on how far it is.
    """
    prompts, seeds = open_prompts(n), [first_seed + index for index in range(n)]
    report = {}
    for scale in guidance_scales:
        own_settings = replace(settings, guidance_scale=scale)

        def look(
            negatives: Sequence[str], what: str, settings: PictureSettings = own_settings
        ) -> list[Shown]:
            seen: list[Shown] = []
            made = batches.make(prompts, negatives, seeds, settings)
            for picture, prompt in zip(made, prompts, strict=True):
                seen.append(shown(picture, prompt))
                if len(seen) % batches.rows == 0 or len(seen) == n:
                    tell(f"guidance {settings.guidance_scale:g}, {what}: {len(seen)} of {n}")
            return seen

        without = look([""] * n, "no negative prompt")
        named = own = without
        if scale > 1:
            named = look([NAMED] * n, f"negative prompt {NAMED!r}")
            own = look([first_color(before) for before in without], "negative prompt: own colour")
        report[f"{scale:g}"] = compare(without, named, own)
    return report


def table_of(report: dict[str, Any]) -> Table:
    """Return a row for each guidance scale."""
    table = Table(title=f"{report['model']} on {report['device']}: negative prompts")
    columns = (
        "guidance", "n", "prompt holds: without, negative red", "red: without, negative red",
        "red removed", "own colour removed", "other colour kept under red",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for scale, row in report["negative"].items():
        holds, reds = row["prompt_holds"], row["red"]
        shares = (
            f"{row[name]['count']} of {row[name]['n']}"
            for name in ("red_removed", "own_color_removed", "other_color_kept_under_negative_red")
        )
        table.add_row(
            scale,
            str(row["n"]),
            f"{holds['without']}, {holds['negative_red']}",
            f"{reds['without']}, {reds['negative_red']}",
            *shares,
        )
    return table
