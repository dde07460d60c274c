"""One to four capitals on an empty ground, mostly at a stated place: scenes to learn letters from.

Words of the ``hard`` kind lie anywhere, beside other things, and in most of them each letter is
one of many small parts. Here a stated place, a narrow range of heights and a known number of
letters leave little doubt where each letter goes, and random capitals leave no word to remember.
"""

import random

from deployments.builtin import layout
from deployments.builtin.claims import WORD, ThingClaim
from deployments.builtin.compose import Composed, Draft, finish
from deployments.builtin.glyphs import LETTERS
from deployments.builtin.looks import draw_word
from deployments.builtin.scene import Word, frame_scale, word_half_extents
from deployments.builtin.vocabulary import COLORS, POSITIONS

_HEIGHT_PX = (54.0, 64.0)
# Real words bring the pairs of letters that prompts have; random ones bring all the others.
_REAL_SHARE = 0.25
_LENGTHS, _LENGTH_WEIGHTS = (1, 2, 3, 4), (0.2, 0.25, 0.3, 0.25)
_PLACED_SHARE = 0.75


def spelled(draft: Draft) -> Composed | None:
    """A string of capitals alone, three times in four at a stated place that it fits."""
    rng = draft.rng
    text = _text(draft)
    low, high = (bound * frame_scale(draft.height, draft.width) for bound in _HEIGHT_PX)
    unit_width = 2 * word_half_extents(len(text), 1.0)[0]
    widest = (draft.width - 2 * layout.MARGIN_PX) / unit_width
    height = min(low + (high - low) * rng.random(), widest)
    extents = word_half_extents(len(text), height)
    position = _position(draft, extents) if rng.random() < _PLACED_SHARE else None
    center = layout.place(position, extents, draft.height, draft.width, rng)
    if center is None:
        return None
    color = rng.choice(COLORS)
    claim = ThingClaim(1, WORD, color, None, position, text)
    return finish(draft, [], [], [], (claim,), word=Word(text, color, height, *center))


def _text(draft: Draft) -> str:
    rng = draft.rng
    if draft.forced.word is not None or rng.random() < _REAL_SHARE:
        return draw_word(rng, draft.forced)
    return "".join(rng.choices(LETTERS, k=rng.choices(_LENGTHS, _LENGTH_WEIGHTS)[0]))


def _position(draft: Draft, extents: layout.Extents) -> str | None:
    """A named position that has room for the word; one of them always has."""
    trial = random.Random(0)
    fitting = [
        position
        for position in POSITIONS
        if layout.place(position, extents, draft.height, draft.width, trial) is not None
    ]
    return draft.rng.choice(fitting) if fitting else None
