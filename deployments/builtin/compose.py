"""Scenes of shapes, each drawn together with the claims that its caption will make.

Every composer takes a Draft and returns a scene and its claims, or None when the drawn sizes do
not fit the frame.
"""

import random
from dataclasses import dataclass

from deployments.builtin import layout
from deployments.builtin.claims import Claims, RelationClaim, ThingClaim
from deployments.builtin.looks import Forced, Look, draw_background, draw_looks, draw_size
from deployments.builtin.scene import Scene, Thing, Word
from deployments.builtin.vocabulary import POSITIONS, RELATIONS

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


def finish(
    draft: Draft,
    looks: list[Look],
    half_widths: list[float],
    centers: list[layout.Center] | None,
    things: tuple[ThingClaim, ...],
    relations: tuple[RelationClaim, ...] = (),
    word: Word | None = None,
    background_chance: float = 0.5,
) -> Composed | None:
    """The scene on a background that all stand out on, and its claims; None without either."""
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


def scatter(
    draft: Draft, positions: list[str | None], half_widths: list[float]
) -> list[layout.Center] | None:
    """Centres at the positions, or anywhere for None."""
    halves = [(half, half) for half in half_widths]
    return layout.scatter(positions, halves, draft.height, draft.width, draft.rng)


def one_thing(draft: Draft) -> Composed | None:
    """One thing, three times in five at a stated position."""
    (look,), ((size, half),) = draft.looks(1), draft.sizes(1, 0.5)
    position = draft.rng.choice(POSITIONS) if draft.rng.random() < 0.6 else None
    claim = ThingClaim(1, *look, size, position)
    return finish(draft, [look], [half], scatter(draft, [position], [half]), (claim,))


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
    return finish(draft, looks, halves, scatter(draft, positions, halves), claims)


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
    return finish(draft, looks, halves, centers, claims, related)


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
    return finish(draft, looks, halves, centers, claims, chain)


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
    return finish(draft, looks, halves, centers, claims, both)


def counted(draft: Draft) -> Composed | None:
    """Two to four equal things, or two such groups of at most four together."""
    counts = draft.rng.choice(((2,), (3,), (3,), (4,), (4,), (2, 1), (1, 2), (2, 2), (3, 1)))
    groups, sizes = draft.looks(len(counts)), draft.sizes(len(counts), 0.25)
    looks, halves, claims = [], [], []
    for count, look, (size, half) in zip(counts, groups, sizes, strict=True):
        looks += [look] * count
        halves += [half] * count
        claims.append(ThingClaim(count, *look, size))
    centers = scatter(draft, [None] * len(looks), halves)
    return finish(draft, looks, halves, centers, tuple(claims))
