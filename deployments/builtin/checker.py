"""Does a picture show what its prompt states? Judged from pixels alone.

The project's measure of prompt adherence; ``attributes`` holds its tolerances. A caption with
counts ("a red circle and a blue star") means these things and no others, a caption without
("red", "stars") only that there are some.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from deployments.builtin.attributes import Attributes, merge, own_attributes, related
from deployments.builtin.claims import WORD, Claims, ThingClaim
from deployments.builtin.lettering import find_word
from deployments.builtin.scene import frame_scale
from deployments.builtin.seen import Seen, see
from deployments.builtin.vocabulary import TAUGHT_SHAPES

# Bounds on the search for who plays whom; a picture beyond them is wrong in count anyway.
_MOST_CANDIDATES = 6
_MOST_SLOTS_SEARCHED = 5

Cast = dict[int, list[Seen | None]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What of a prompt's claims a picture shows.

    Attributes:
        attributes: for each category that the prompt states (shape, color, size, position,
            relation, count, background, word) whether all its claims hold.
        seen: what was found in the picture, in plain words, largest first.
    """

    attributes: Attributes
    seen: tuple[str, ...]

    @property
    def all_right(self) -> bool:
        """Whether every stated attribute is in the picture."""
        return all(self.attributes.values())


def check(image: npt.NDArray[np.uint8], claims: Claims) -> Verdict:
    """Judge one picture.

    Args:
        image: uint8 [height, width, 3], RGB.
        claims: what the prompt states.

    Raises:
        ValueError: an image of another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [height, width, 3], got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    background, things = see(image, _taught(claims))
    described = tuple(thing.description for thing in things)
    attributes: Attributes = {}
    if claims.background is not None:
        attributes["background"] = claims.background == background
    if claims.exact:
        attributes |= _check_exact(things, claims, height, width)
    elif claims.things:
        attributes |= _check_open(things, claims, height, width)
    return Verdict(attributes, described)


def _taught(claims: Claims) -> set[str]:
    """The taught shapes that are asked for: only then may a thing be one."""
    return {thing.shape for thing in claims.things if thing.shape in TAUGHT_SHAPES}


def _check_exact(things: list[Seen], claims: Claims, height: int, width: int) -> Attributes:
    """Every claimed thing has one of its own in the picture, and nothing is left over."""
    words: Cast = {}
    slots: list[int] = []
    for index, claim in enumerate(claims.things):
        if claim.shape == WORD:
            word, things = find_word(things, claim.text or "")
            words[index] = [word]
        else:
            slots += [index] * (claim.count or 1)
    candidates: list[Seen | None] = [*things[: max(_MOST_CANDIDATES, len(slots))]]
    candidates += [None] * (len(slots) - len(candidates))
    own = [
        [own_attributes(claims.things[index], seen, height, width) for seen in candidates]
        for index in slots
    ]
    word_rows = [
        own_attributes(claims.things[index], word, height, width)
        for index, (word,) in words.items()
    ]
    best: Attributes = {}
    best_score = -1
    for players in _castings(own, len(candidates)):
        cast: Cast = dict(words)
        for index, player in zip(slots, players, strict=True):
            cast[index] = [*cast.get(index, []), candidates[player]]
        rows = [row[player] for row, player in zip(own, players, strict=True)]
        rows += [*word_rows, _relations(claims, cast, frame_scale(height, width))]
        score = sum(sum(row.values()) for row in rows)
        if score > best_score:
            best, best_score = merge(rows), score
    best["count"] = len(things) == len(slots)
    return best


def _castings(own: list[list[Attributes]], candidates: int) -> Iterator[tuple[int, ...]]:
    """Which candidate plays each slot: all ways, or the best by own attributes when many."""
    if len(own) <= _MOST_SLOTS_SEARCHED:
        yield from permutations(range(candidates), len(own))
        return
    scores = np.array([[sum(row.values()) for row in slot] for slot in own])
    yield tuple(int(player) for player in linear_sum_assignment(-scores)[1])


def _relations(claims: Claims, cast: Cast, scale: float) -> Attributes:
    if not claims.relations:
        return {}
    holds = all(
        related(relation.relation, subject, target, scale)
        for relation in claims.relations
        for subject in cast[relation.subject]
        for target in cast[relation.object]
    )
    return {"relation": holds}


def _check_open(things: list[Seen], claims: Claims, height: int, width: int) -> Attributes:
    """Every claim holds for at least as many things as it counts (one, when it counts none)."""
    rows: list[Attributes] = []
    playing: dict[int, list[Seen]] = {}
    for index, claim in enumerate(claims.things):
        candidates, least = _open_candidates(things, claim)
        graded = [(own_attributes(claim, seen, height, width), seen) for seen in candidates]
        graded.sort(key=lambda pair: -sum(pair[0].values()))
        missing = [own_attributes(claim, None, height, width)] * (least - len(graded))
        rows += [row for row, _ in graded[:least]] + missing
        playing[index] = [seen for row, seen in graded if all(row.values())]
    for relation in claims.relations:
        holds = any(
            related(relation.relation, subject, target, frame_scale(height, width))
            for subject in playing[relation.subject]
            for target in playing[relation.object]
        )
        rows.append({"relation": holds})
    return merge(rows)


def _open_candidates(things: list[Seen], claim: ThingClaim) -> tuple[list[Seen], int]:
    """The things that may play a claim without an exact count, and how many must."""
    if claim.shape != WORD:
        return things, claim.count or 1
    if claim.text is not None:
        word, _ = find_word(things, claim.text)
        return ([] if word is None else [word]), 1
    # One letter alone is hardly "text".
    return [thing for thing in things if thing.looks_written], 2
