"""What is in one picture, before it is drawn: coordinates in pixels, names from the vocabulary."""

from dataclasses import dataclass

from deployments.builtin.claims import Claims

# Geometry of a written word, in letter heights: shared by layout, drawing and checking.
LETTER_WIDTH = 0.72
LETTER_GAP = 0.22


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn shape.

    Attributes:
        shape: a name of ``SHAPES`` or ``TAUGHT_SHAPES``.
        color: a name of ``COLORS``.
        half_width_px: half the side of the square box that holds the shape.
        center_x: centre of that box, pixels from the left edge.
        center_y: centre of that box, pixels from the top edge.
    """

    shape: str
    color: str
    half_width_px: float
    center_x: float
    center_y: float


@dataclass(frozen=True, slots=True)
class Word:
    """Capital letters in one line, drawn with thick strokes around a centre in pixels."""

    text: str
    color: str
    letter_height_px: float
    center_x: float
    center_y: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: nothing overlaps, everything lies inside the frame."""

    height: int
    width: int
    background: str
    things: tuple[Thing, ...]
    word: Word | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A scene, a caption of it, and what that caption states."""

    scene: Scene
    prompt: str
    claims: Claims


def frame_scale(height: int, width: int) -> float:
    """Pixels of this frame per pixel of a 256x256 one: sizes follow the area, not one side."""
    return float((height * width) ** 0.5) / 256.0


def word_half_extents(length: int, letter_height_px: float) -> tuple[float, float]:
    """Half width and half height in pixels of a word of ``length`` letters."""
    width = length * LETTER_WIDTH + (length - 1) * LETTER_GAP
    return width * letter_height_px / 2, letter_height_px / 2
