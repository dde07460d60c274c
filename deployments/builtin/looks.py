"""Random attributes of things: shape and colour within a split, sizes, backgrounds, words."""

import random
from dataclasses import dataclass

from deployments.builtin.held_out import HELD_OUT_PAIRS, HELD_OUT_TRIPLES, HELD_OUT_WORDS
from deployments.builtin.palette import BACKGROUNDS_FOR
from deployments.builtin.scene import frame_scale
from deployments.builtin.vocabulary import (
    BACKGROUNDS,
    COLORS,
    OPPOSITE_RELATION,
    SHAPES,
    WRITTEN_WORDS,
)

# Half-widths in pixels of a 256x256 frame. The gap between small and large is what lets a person,
# and the checker, name the size of a thing that stands alone.
SMALL_PX = (26.0, 30.0)
LARGE_PX = (46.0, 54.0)
CROWDED_SMALL_PX = (24.0, 28.0)
CROWDED_LARGE_PX = (44.0, 48.0)
CROWDED_PX = (24.0, 34.0)

_ALL_PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
_TRAIN_PAIRS = tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT_PAIRS)
_TRAIN_WORDS = tuple(word for word in WRITTEN_WORDS if word not in HELD_OUT_WORDS)
_EVERY_BACKGROUND = frozenset(BACKGROUNDS)

Look = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Forced:
    """The held-out combination that an example is built around; all None for training."""

    pair: Look | None = None
    triple: tuple[str, str, str] | None = None
    word: str | None = None


NOTHING_FORCED = Forced()


def force_held_out(rng: random.Random, *, triples: bool) -> Forced:
    """A held-out pair, or in half of the draws a held-out triple where the kind can state one."""
    if triples and rng.random() < 0.5:
        first, relation, second = rng.choice(HELD_OUT_TRIPLES)
        if rng.random() < 0.5:
            return Forced(triple=(second, OPPOSITE_RELATION[relation], first))
        return Forced(triple=(first, relation, second))
    return Forced(pair=rng.choice(HELD_OUT_PAIRS))


def draw_looks(rng: random.Random, number: int, forced: Forced, *, held_out: bool) -> list[Look]:
    """Distinct (shape, colour) pairs; a forced pair takes a random place.

    A forced triple gives the shapes of the first and second thing.
    """
    pool = _ALL_PAIRS if held_out else _TRAIN_PAIRS
    looks: list[Look] = []
    while len(looks) < number:
        shape, color = pool[int(rng.random() * len(pool))]
        if forced.triple is not None and len(looks) < 2:
            shape = forced.triple[2 * len(looks)]
        if (shape, color) not in looks:
            looks.append((shape, color))
    if forced.pair is not None and forced.pair not in looks:
        looks[int(rng.random() * number)] = forced.pair
    return looks


def draw_size(
    rng: random.Random, height: int, width: int, *, state_chance: float, crowded: bool
) -> tuple[str | None, float]:
    """The stated size, if any, and a half-width in pixels of this frame."""
    if rng.random() >= state_chance:
        low, high = CROWDED_PX if crowded else (SMALL_PX[0], LARGE_PX[0] + 4.0)
        size = None
    elif rng.random() < 0.5:
        size, (low, high) = "small", CROWDED_SMALL_PX if crowded else SMALL_PX
    else:
        size, (low, high) = "large", CROWDED_LARGE_PX if crowded else LARGE_PX
    return size, (low + (high - low) * rng.random()) * frame_scale(height, width)


def draw_background(rng: random.Random, colors: list[str]) -> str | None:
    """A background that every colour stands out on, white most often; None if there is none."""
    fitting = _EVERY_BACKGROUND.intersection(*(BACKGROUNDS_FOR[color] for color in colors))
    if "white" in fitting and rng.random() < 0.25:
        return "white"
    choices = [background for background in BACKGROUNDS if background in fitting]
    return rng.choice(choices) if choices else None


def draw_word(rng: random.Random, forced: Forced) -> str:
    """A real word, or in two of five draws random capitals, two to four letters."""
    if forced.word is not None:
        return forced.word
    if rng.random() < 0.6:
        return rng.choice(_TRAIN_WORDS)
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.choice((2, 3, 3, 4))))
