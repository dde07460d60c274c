"""Scenes with a written word, drawn together with the claims that their captions will make."""

import math

from deployments.builtin import layout
from deployments.builtin.claims import WORD, RelationClaim, ThingClaim
from deployments.builtin.compose import Composed, Draft, finish
from deployments.builtin.looks import draw_word
from deployments.builtin.scene import Word, frame_scale, word_half_extents
from deployments.builtin.vocabulary import COLORS


def _letters(
    draft: Draft, low: float, high: float, most_height: float = math.inf
) -> tuple[str, float, layout.Extents] | None:
    """A word, its letter height and half extents in pixels; None if the frame is too narrow."""
    text = draw_word(draft.rng, draft.forced)
    scale = frame_scale(draft.height, draft.width)
    unit_width = 2 * word_half_extents(len(text), 1.0)[0]
    most = min(high * scale, (draft.width - 2 * layout.MARGIN_PX) / unit_width, most_height)
    if most < 40.0:
        return None
    height = max(40.0, min(low * scale, most))
    height += (most - height) * draft.rng.random()
    return text, height, word_half_extents(len(text), height)


def written(draft: Draft) -> Composed | None:
    """A coloured word alone, or with one thing above, below or somewhere beside it."""
    rng = draft.rng
    letters = _letters(draft, 46.0, 72.0, 0.45 * draft.height)
    if letters is None:
        return None
    text, letter_height, extents = letters
    color = rng.choice(COLORS)
    if rng.random() < 0.5:
        position = rng.choice(("top", "center", "bottom")) if rng.random() < 0.5 else None
        center = layout.place(position, extents, draft.height, draft.width, rng)
        if center is None:
            return None
        word = Word(text, color, letter_height, *center)
        claim = ThingClaim(1, WORD, color, None, position, text)
        return finish(draft, [], [], [], (claim,), word=word)
    (look,), ((size, half),) = draft.looks(1), draft.sizes(1, 0.2)
    boxes = [extents, (half, half)]
    relation = rng.choice(("above", "below")) if rng.random() < 0.6 else None
    if relation is None:
        centers = layout.scatter([None, None], boxes, draft.height, draft.width, rng)
    else:
        order = 1 if relation == "above" else -1
        centers = layout.row(boxes[::order], False, draft.height, draft.width, rng)
        centers = None if centers is None else centers[::order]
    if centers is None:
        return None
    word = Word(text, color, letter_height, *centers[0])
    claims = [ThingClaim(1, WORD, color, None, None, text), ThingClaim(1, *look, size)]
    subject = 0
    if rng.random() < 0.5:
        claims.reverse()
        subject = 1
    related: tuple[RelationClaim, ...] = ()
    if relation is not None:
        flipped = "below" if relation == "above" else "above"
        stated = relation if subject == 0 else flipped
        related = (RelationClaim(0, stated, 1),)
    return finish(draft, [look], [half], centers[1:], tuple(claims), related, word=word)


def some_text(draft: Draft) -> Composed | None:
    """A written word of which at most the colour is said."""
    letters = _letters(draft, 46.0, 72.0)
    if letters is None:
        return None
    text, height, extents = letters
    center = layout.place(None, extents, draft.height, draft.width, draft.rng)
    if center is None:
        return None
    color = draft.rng.choice(COLORS)
    claim = ThingClaim(None, WORD, color if draft.rng.random() < 0.4 else None)
    word = Word(text, color, height, *center)
    return finish(draft, [], [], [], (claim,), word=word, background_chance=0.15)


def bare_word(draft: Draft) -> Composed | None:
    """A written word of which no colour is said."""
    letters = _letters(draft, 46.0, 72.0)
    if letters is None:
        return None
    text, height, extents = letters
    center = layout.place(None, extents, draft.height, draft.width, draft.rng)
    if center is None:
        return None
    word = Word(text, draft.rng.choice(COLORS), height, *center)
    claim = ThingClaim(1, WORD, None, None, None, text)
    return finish(draft, [], [], [], (claim,), word=word, background_chance=0.15)
