"""The sorts of scenes, each drawn together with the claims that its caption will make.

Every composer takes a Draft and returns a scene and its claims, or None when the drawn sizes do
not fit the frame.
"""

import math
import random
from dataclasses import dataclass

from deployments.builtin import layout
from deployments.builtin.claims import WORD, Claims, RelationClaim, ThingClaim
from deployments.builtin.looks import (
    Forced,
    Look,
    draw_background,
    draw_looks,
    draw_size,
    draw_word,
)
from deployments.builtin.scene import Scene, Thing, Word, frame_scale, word_half_extents
from deployments.builtin.vocabulary import COLORS, POSITIONS, RELATIONS

Composed = tuple[Scene, Claims]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a composer works from."""

    rng: random.Random
    kind: str
    forced: Forced
    held_out: bool
    height: int
    width: int

    @property
    def crowded(self) -> bool:
        """Whether things are drawn smaller, to make room for three or four."""
        return self.kind != "core"

    def looks(self, number: int) -> list[Look]:
        """Distinct (shape, colour) pairs within the split."""
        return draw_looks(self.rng, number, self.forced, held_out=self.held_out)

    def sizes(self, number: int, state_chance: float = 0.35) -> list[tuple[str | None, float]]:
        """Stated sizes and half-widths in pixels."""
        return [
            draw_size(
                self.rng,
                self.height,
                self.width,
                state_chance=state_chance,
                crowded=self.crowded,
            )
            for _ in range(number)
        ]


def _finish(
    draft: Draft,
    looks: list[Look],
    half_widths: list[float],
    centers: list[layout.Center] | None,
    things: tuple[ThingClaim, ...],
    relations: tuple[RelationClaim, ...] = (),
    word: Word | None = None,
    background_chance: float = 0.5,
) -> Composed | None:
    if centers is None:
        return None
    colors = [color for _, color in looks]
    background = draw_background(draft.rng, colors if word is None else [*colors, word.color])
    if background is None:
        return None
    drawn = tuple(
        Thing(shape, color, half, *center)
        for (shape, color), half, center in zip(looks, half_widths, centers, strict=True)
    )
    stated = background if draft.rng.random() < background_chance else None
    scene = Scene(draft.height, draft.width, background, drawn, word)
    return scene, Claims(things, relations, stated)


def _scatter(
    draft: Draft, positions: list[str | None], half_widths: list[float]
) -> list[layout.Center] | None:
    halves = [(half, half) for half in half_widths]
    return layout.scatter(positions, halves, draft.height, draft.width, draft.rng)


def one_thing(draft: Draft) -> Composed | None:
    """One thing, three times in five at a stated position."""
    (look,), ((size, half),) = draft.looks(1), draft.sizes(1, 0.5)
    position = draft.rng.choice(POSITIONS) if draft.rng.random() < 0.6 else None
    claim = ThingClaim(1, *look, size, position)
    return _finish(draft, [look], [half], _scatter(draft, [position], [half]), (claim,))


def several_placed(draft: Draft) -> Composed | None:
    """Two things (core) or three to four (hard), all at stated positions or none."""
    number = 2 if draft.kind == "core" else draft.rng.choice((3, 3, 4))
    looks, sizes = draft.looks(number), draft.sizes(number, 0.35 if number == 2 else 0.2)
    positions: list[str | None] = [None] * number
    if draft.rng.random() < 0.6:
        positions = list(draft.rng.sample(POSITIONS, number))
    halves = [half for _, half in sizes]
    claims = tuple(
        ThingClaim(1, *look, size, position)
        for look, (size, _), position in zip(looks, sizes, positions, strict=True)
    )
    return _finish(draft, looks, halves, _scatter(draft, positions, halves), claims)


def two_related(draft: Draft) -> Composed | None:
    """Two things, one beside or above the other."""
    looks, sizes = draft.looks(2), draft.sizes(2)
    relation = draft.forced.triple[1] if draft.forced.triple else draft.rng.choice(RELATIONS)
    halves = [half for _, half in sizes]
    order = (0, 1) if relation in ("left of", "above") else (1, 0)
    centers = layout.row(
        [(halves[index], halves[index]) for index in order],
        relation in ("left of", "right of"),
        draft.height,
        draft.width,
        draft.rng,
    )
    if centers is None:
        return None
    centers = [centers[index] for index in order]
    subject = 0
    if draft.rng.random() < 0.15:
        subject = 1
        for column in (looks, sizes, halves, centers):
            column.reverse()
    claims = tuple(ThingClaim(1, *look, size) for look, (size, _) in zip(looks, sizes, strict=True))
    related = (RelationClaim(subject, relation, 1 - subject),)
    return _finish(draft, looks, halves, centers, claims, related)


def in_a_row(draft: Draft) -> Composed | None:
    """Three or four things from left to right, or from top to bottom."""
    number = draft.rng.choice((3, 3, 4))
    looks, sizes = draft.looks(number), draft.sizes(number, 0.12)
    relation = draft.rng.choice(("left of", "above"))
    if draft.forced.triple is not None:
        _, relation, _ = draft.forced.triple
        if relation in ("right of", "below"):
            relation = {"right of": "left of", "below": "above"}[relation]
            looks[0], looks[1] = looks[1], looks[0]
    halves = [half for _, half in sizes]
    centers = layout.row(
        [(half, half) for half in halves],
        relation == "left of",
        draft.height,
        draft.width,
        draft.rng,
    )
    claims = tuple(ThingClaim(1, *look, size) for look, (size, _) in zip(looks, sizes, strict=True))
    chain = tuple(RelationClaim(i, relation, i + 1) for i in range(number - 1))
    return _finish(draft, looks, halves, centers, claims, chain)


def related_to_two(draft: Draft) -> Composed | None:
    """Three things: the first beside the second and above or below the third."""
    looks, sizes = draft.looks(3), draft.sizes(3, 0.15)
    beside = draft.rng.choice(("left of", "right of"))
    across = draft.rng.choice(("above", "below"))
    if draft.forced.triple is not None:
        relation = draft.forced.triple[1]
        if relation in ("left of", "right of"):
            beside = relation
        else:
            across = relation
            looks[1], looks[2] = looks[2], looks[1]
    halves = [half for _, half in sizes]
    sides = (1 if beside == "left of" else -1, 1 if across == "above" else -1)
    boxes = [(half, half) for half in halves]
    centers = layout.beside_and_across(boxes, sides, draft.height, draft.width, draft.rng)
    claims = tuple(ThingClaim(1, *look, size) for look, (size, _) in zip(looks, sizes, strict=True))
    both = (RelationClaim(0, beside, 1), RelationClaim(0, across, 2))
    return _finish(draft, looks, halves, centers, claims, both)


def counted(draft: Draft) -> Composed | None:
    """Two to four equal things, or two such groups of at most four together."""
    counts = draft.rng.choice(((2,), (3,), (3,), (4,), (4,), (2, 1), (1, 2), (2, 2), (3, 1)))
    groups, sizes = draft.looks(len(counts)), draft.sizes(len(counts), 0.25)
    looks, halves, claims = [], [], []
    for count, look, (size, half) in zip(counts, groups, sizes, strict=True):
        looks += [look] * count
        halves += [half] * count
        claims.append(ThingClaim(count, *look, size))
    centers = _scatter(draft, [None] * len(looks), halves)
    return _finish(draft, looks, halves, centers, tuple(claims))


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
        return _finish(draft, [], [], [], (claim,), word=word)
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
    return _finish(draft, [look], [half], centers[1:], tuple(claims), related, word=word)


def keywords(draft: Draft) -> Composed | None:
    """One to three things of which only a feature or two is said, with no count."""
    rng = draft.rng
    if draft.forced.pair is None and rng.random() < 0.12:
        return _some_text(draft)
    number = rng.choice((1, 1, 2, 3))
    looks, sizes = draft.looks(number), draft.sizes(number, 1.0)
    claims: list[ThingClaim] = []
    mentioned = looks[:] if draft.forced.pair is None else [draft.forced.pair]
    for look in mentioned[: rng.choice((1, 1, 2))]:
        (shape, color), size = look, sizes[looks.index(look)][0]
        sort = rng.random() if draft.forced.pair is None else 0.7
        claim = ThingClaim(
            None,
            None if sort < 0.35 else shape,
            None if 0.35 <= sort < 0.65 else color,
            size if rng.random() < 0.15 else None,
        )
        if claim not in claims:
            claims.append(claim)
    halves = [half for _, half in sizes]
    centers = _scatter(draft, [None] * number, halves)
    return _finish(draft, looks, halves, centers, tuple(claims), background_chance=0.15)


def _some_text(draft: Draft) -> Composed | None:
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
    return _finish(draft, [], [], [], (claim,), word=word, background_chance=0.15)


def bare_count(draft: Draft) -> Composed | None:
    """A star, two hearts, three small shapes: exact in number, silent in most else."""
    rng = draft.rng
    number = rng.choice((1, 1, 1, 2, 2, 3, 4))
    looks, (size, half) = draft.looks(number), draft.sizes(1, 0.3)[0]
    shape, color = looks[0] if draft.forced.pair is None else draft.forced.pair
    sort = rng.random() if draft.forced.pair is None else 0.9
    if sort < 0.4:
        looks = [(shape, look[1]) for look in looks]
        claim = ThingClaim(number, shape, None, size)
    elif sort < 0.6:
        looks = [(look[0], color) for look in looks]
        claim = ThingClaim(number, None, color, size)
    elif sort < 0.7:
        claim = ThingClaim(number, None, None, size)
    else:
        looks = [(shape, color)] * number
        claim = ThingClaim(number, shape, color, size)
    halves = [half] * number
    centers = _scatter(draft, [None] * number, halves)
    return _finish(draft, looks, halves, centers, (claim,), background_chance=0.15)


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
    return _finish(draft, [], [], [], (claim,), word=word, background_chance=0.15)


def only_background(draft: Draft) -> Composed | None:
    """Any scene of one or two things, of which only the background is said."""
    number = draft.rng.choice((1, 2))
    looks, sizes = draft.looks(number), draft.sizes(number, 0.0)
    halves = [half for _, half in sizes]
    centers = _scatter(draft, [None] * number, halves)
    return _finish(draft, looks, halves, centers, (), background_chance=1.0)
