"""Which shape or letter a part is: the drawn template that it overlaps best.

Part and template are both brought to one frame in which their mass has mean zero and standard
deviation one along either axis, so place, size and a little stretching do not matter; how far
the part had to be stretched is judged by itself. A few stray pixels move moments little, where
they would move a bounding box much.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from deployments.builtin.draw import draw
from deployments.builtin.glyphs import LETTERS
from deployments.builtin.scene import Scene, Thing, Word
from deployments.builtin.segment import Floats, Part
from deployments.builtin.vocabulary import SHAPES, TAUGHT_SHAPES

_GRID = 48
_REACH = 2.6
_TEMPLATE_PX = 96
# Change of the box's diagonal, in radians, that costs a likeness 40 %: a letter a fifth too wide
# still reads. An angle and not a ratio, because a slightly bent "I" doubles its ratio.
_SLANT_WIDTH = 0.23


@dataclass(frozen=True, slots=True)
class Likeness:
    """How well a part fits one template.

    Attributes:
        name: a shape, or a capital letter.
        overlap: intersection over union in the common frame, 0..1.
        aspect: the part's width over height, as standard deviations.
        template_aspect: the template's.
    """

    name: str
    overlap: float
    aspect: float
    template_aspect: float

    @property
    def stretch(self) -> float:
        """How much wider than the template, at equal height."""
        return self.aspect / self.template_aspect

    @property
    def score(self) -> float:
        """Overlap, less for an unlike stretch: ranks shapes and letters together."""
        slant = math.atan(self.aspect) - math.atan(self.template_aspect)
        return self.overlap * math.exp(-0.5 * (slant / _SLANT_WIDTH) ** 2)


def _normalised(coverage: Floats) -> tuple[Floats, float]:
    """The coverage resampled to the common frame [48, 48], and its width over height."""
    total = float(coverage.sum())
    columns, rows = coverage.sum(0) / total, coverage.sum(1) / total
    x, y = np.arange(coverage.shape[1]), np.arange(coverage.shape[0])
    mean_x, mean_y = float(columns @ x), float(rows @ y)
    spread_x = max(float(columns @ (x - mean_x) ** 2) ** 0.5, 0.3)
    spread_y = max(float(rows @ (y - mean_y) ** 2) ** 0.5, 0.3)
    grid = np.linspace(-_REACH, _REACH, _GRID)
    points = np.meshgrid(mean_y + grid * spread_y, mean_x + grid * spread_x, indexing="ij")
    frame = ndimage.map_coordinates(coverage, points, order=1, mode="constant", cval=0.0)
    return frame.astype(np.float32), spread_x / spread_y


@cache
def _templates() -> tuple[tuple[str, ...], Floats, Floats, dict[str, float]]:
    """Names; frames [35, 48, 48]; widths over heights [35]; shape -> area at half-width one."""
    side, middle = 2 * _TEMPLATE_PX + 32, _TEMPLATE_PX + 16.0
    shapes = [
        Scene(side, side, "black", (Thing(shape, "white", _TEMPLATE_PX, middle, middle),))
        for shape in (*SHAPES, *TAUGHT_SHAPES)
    ]
    letters = [
        Scene(side, side, "black", (), Word(letter, "white", 2.0 * _TEMPLATE_PX, middle, middle))
        for letter in LETTERS
    ]
    pictures = draw([*shapes, *letters])[:, 0].numpy().astype(np.float32)
    low, high = pictures.min(), pictures.max()
    frames, aspects, areas = [], [], {}
    names = (*SHAPES, *TAUGHT_SHAPES, *LETTERS)
    for name, picture in zip(names, (pictures - low) / (high - low), strict=True):
        frame, aspect = _normalised(picture)
        frames.append(frame)
        aspects.append(aspect)
        areas[name] = float(picture.sum()) / _TEMPLATE_PX**2
    return names, np.stack(frames), np.array(aspects, dtype=np.float32), areas


def likenesses(part: Part, taught: Collection[str] = ()) -> dict[str, Likeness]:
    """How well the part fits every shape and every letter, by name.

    Args:
        part: one thing in a picture.
        taught: names of ``TAUGHT_SHAPES`` to compare it with too.
    """
    names, frames, aspects, _ = _templates()
    frame, aspect = _normalised(part.coverage)
    overlaps = np.minimum(frames, frame).sum((1, 2)) / np.maximum(frames, frame).sum((1, 2))
    return {
        name: Likeness(name, float(overlap), aspect, float(own))
        for name, overlap, own in zip(names, overlaps, aspects, strict=True)
        if name not in TAUGHT_SHAPES or name in taught
    }


def half_width_px(part: Part, shape: str) -> float:
    """The half-width in pixels at which a shape covers as many pixels as the part."""
    return float((part.area_px / _templates()[3][shape]) ** 0.5)
