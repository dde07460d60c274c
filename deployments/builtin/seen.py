"""What the checker makes of a picture: its background, and each thing with look and place."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deployments.builtin.glyphs import LETTERS
from deployments.builtin.segment import Part, background_of, find_parts
from deployments.builtin.templates import Likeness, half_width_px, likenesses

MINIMUM_LETTER_SCORE = 0.6
# A picture in pieces is wrong however many there are; this bounds the time that it takes.
_MOST_THINGS = 16


@dataclass(frozen=True, slots=True)
class Seen:
    """One thing, or one whole written word.

    Attributes:
        parts: the separate pieces; a word has one for each letter, from left to right.
        likeness: of the first piece to every shape and letter.
        text: the letters read, for a word; empty otherwise.
    """

    parts: tuple[Part, ...]
    likeness: dict[str, Likeness]
    text: str = ""

    @property
    def shape(self) -> Likeness:
        """The shape that it overlaps best."""
        shapes = (fit for name, fit in self.likeness.items() if name not in LETTERS)
        return max(shapes, key=lambda fit: fit.overlap)

    @property
    def letter(self) -> Likeness:
        """The letter that it is most like."""
        letters = (fit for name, fit in self.likeness.items() if name in LETTERS)
        return max(letters, key=lambda fit: fit.score)

    @property
    def looks_written(self) -> bool:
        """Whether it is more like a letter than like a shape."""
        return self.letter.score >= MINIMUM_LETTER_SCORE and self.letter.score > self.shape.score

    @property
    def color(self) -> str:
        """The colour of most of its pieces."""
        colors = [part.color for part in self.parts]
        return max(colors, key=colors.count)

    @property
    def purity(self) -> float:
        """Share of its inside that has its colour; of a word, of its worst letter."""
        return min(part.purity if part.color == self.color else 0.0 for part in self.parts)

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box around it, (x, y) in pixels."""
        boxes = [part.extents for part in self.parts]
        left, right = min(box[0] for box in boxes), max(box[1] for box in boxes)
        top, bottom = min(box[2] for box in boxes), max(box[3] for box in boxes)
        return (left + right) / 2, (top + bottom) / 2

    def half_width_px(self, shape: str | None) -> float:
        """Its half-width in pixels, taken as ``shape``, or as what it looks like for None."""
        return half_width_px(self.parts[0], shape if shape in self.likeness else self.shape.name)

    @property
    def description(self) -> str:
        """In plain words."""
        if self.text:
            return f'the word "{self.text}" in {self.color}'
        if self.looks_written:
            return f"{self.color} letter {self.letter.name} ({self.letter.score:.2f})"
        return f"{self.color} {self.shape.name} ({self.shape.overlap:.2f})"


def see(image: npt.NDArray[np.uint8], taught: Collection[str] = ()) -> tuple[str, list[Seen]]:
    """The background's name and the separate things, largest first; letters are still apart.

    Args:
        image: uint8 [height, width, 3], RGB.
        taught: names of ``TAUGHT_SHAPES`` that a thing may be, beside every one of ``SHAPES``.
    """
    background, ground = background_of(image)
    parts = find_parts(image, ground)[:_MOST_THINGS]
    return background, [Seen((part,), likenesses(part, taught)) for part in parts]
