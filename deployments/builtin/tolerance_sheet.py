"""What the checker lets pass and what it does not: five pictures on either side of its bounds.

    python -m deployments.builtin.tolerance_sheet DIR

writes ``DIR/tolerance.png``, ten pictures each just inside or just outside one tolerance, for a
person to say whether the bound lies where they would put it. Left to right: a stretched square, a
circle with a piece missing, a circle between red and orange, a square between small and large, a
ring between left and middle. Upper row: accepted; lower row: refused.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from deployments.builtin.checker import Verdict, check
from deployments.builtin.palette import BACKGROUND_RGB, COLOR_RGB
from deployments.builtin.read import read_claims
from deployments.builtin.sample_sheet import write_sheet

SIDE_PX = 256
_FINE = 4  # drawn so many times larger and then reduced, for soft edges


class Border(NamedTuple):
    """Two pictures of one prompt, on either side of one tolerance."""

    prompt: str
    what: str
    paint: Callable[[ImageDraw.ImageDraw, float], None]
    accepted: float
    refused: float


def _box(
    x: float, y: float, half_width: float, half_height: float
) -> tuple[float, float, float, float]:
    fine = (x - half_width, y - half_height, x + half_width, y + half_height)
    return tuple(_FINE * value for value in fine)  # type: ignore[return-value]


def _stretched_square(canvas: ImageDraw.ImageDraw, stretch: float) -> None:
    canvas.rectangle(_box(128, 128, 40 * stretch, 40), COLOR_RGB["red"])


def _bitten_circle(canvas: ImageDraw.ImageDraw, degrees: float) -> None:
    canvas.pieslice(_box(128, 128, 45, 45), degrees / 2 - 45, 315 - degrees / 2, COLOR_RGB["green"])


def _blended_circle(canvas: ImageDraw.ImageDraw, share: float) -> None:
    pairs = zip(COLOR_RGB["red"], COLOR_RGB["orange"], strict=True)
    mixed = tuple(round(red + share * (orange - red)) for red, orange in pairs)
    canvas.ellipse(_box(128, 128, 45, 45), mixed)


def _square_of_size(canvas: ImageDraw.ImageDraw, half_width: float) -> None:
    canvas.rectangle(_box(128, 128, half_width, half_width), COLOR_RGB["orange"])


def _ring_at(canvas: ImageDraw.ImageDraw, place: float) -> None:
    canvas.ellipse(_box(place * SIDE_PX, 128, 36, 36), COLOR_RGB["purple"])
    canvas.ellipse(_box(place * SIDE_PX, 128, 20, 20), BACKGROUND_RGB["white"])


BORDERS = (
    Border("a red square", "sides as 1 to {}", _stretched_square, 1.2, 1.3),
    Border("a green circle", "{} degrees missing", _bitten_circle, 90.0, 120.0),
    Border("a red circle", "{} of the way to orange", _blended_circle, 0.4, 0.6),
    Border("a small orange square", "half-width {} px", _square_of_size, 32.0, 36.0),
    Border("a purple ring on the left", "middle at {} of the width", _ring_at, 0.4, 0.44),
)


def picture(border: Border, value: float) -> torch.Tensor:
    """One picture of a border, uint8 [3, side, side]."""
    side = SIDE_PX * _FINE
    large = Image.new("RGB", (side, side), BACKGROUND_RGB["white"])
    border.paint(ImageDraw.Draw(large), value)
    small = large.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def judged(border: Border, value: float) -> Verdict:
    """The checker's verdict on that picture."""
    pixels = picture(border, value).permute(1, 2, 0).contiguous().numpy()
    return check(pixels, read_claims(border.prompt))


def main() -> None:
    """Write the sheet that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m deployments.builtin.tolerance_sheet")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    rows = [(border, border.accepted) for border in BORDERS]
    rows += [(border, border.refused) for border in BORDERS]
    captions = []
    for border, value in rows:
        verdict = judged(border, value)
        wrong = [name for name, right in verdict.attributes.items() if not right]
        said = f"refused: {', '.join(wrong)}" if wrong else "accepted"
        captions.append(f"{border.prompt}; {border.what.format(value)}; {said}")
    frames = [picture(border, value) for border, value in rows]
    write_sheet(directory / "tolerance.png", frames, captions, len(BORDERS))


if __name__ == "__main__":
    main()
