"""Which combinations training never sees, so that prompts about them test composition.

Held out are eleven (shape, colour) pairs, one for each colour; eight (shape, relation, shape)
triples, each shape once on either side; and every eighth written word. A training scene contains
none of them, stated or not; "right of" and "below" count as "left of" and "above" turned round.
"""

from deployments.builtin.claims import Claims
from deployments.builtin.geometry import relation_holds
from deployments.builtin.scene import Scene, frame_scale
from deployments.builtin.vocabulary import COLORS, SHAPES, WRITTEN_WORDS

HELD_OUT_PAIRS = tuple(
    (SHAPES[(3 * index + 1) % len(SHAPES)], color) for index, color in enumerate(COLORS)
)
HELD_OUT_TRIPLES = tuple(
    (shape, "left of", SHAPES[(index + 3) % len(SHAPES)])
    if index % 2 == 0
    else (shape, "above", SHAPES[(index + 5) % len(SHAPES)])
    for index, shape in enumerate(SHAPES)
)
HELD_OUT_WORDS = WRITTEN_WORDS[3::8]
# Colours in which no taught shape is drawn.
HELD_OUT_TAUGHT_COLORS = ("orange", "purple")

_PAIRS = frozenset(HELD_OUT_PAIRS)
_TRIPLES = frozenset(HELD_OUT_TRIPLES)
_ARRANGEMENT = {(first, second): relation for first, relation, second in HELD_OUT_TRIPLES}
_WORDS = frozenset(HELD_OUT_WORDS)


def contains_held_out(scene: Scene) -> bool:
    """Whether a held-out combination is anywhere in the scene, stated or not."""
    if scene.word is not None and scene.word.text in _WORDS:
        return True
    things = scene.things
    if any((thing.shape, thing.color) in _PAIRS for thing in things):
        return True
    for thing in things:
        for other in things:
            relation = _ARRANGEMENT.get((thing.shape, other.shape))
            if relation is not None and relation_holds(
                relation,
                other.center_x - thing.center_x,
                other.center_y - thing.center_y,
                frame_scale(scene.height, scene.width),
            ):
                return True
    return False


def states_held_out(claims: Claims) -> bool:
    """Whether a held-out combination is stated."""
    things = claims.things
    if any((thing.shape, thing.color) in _PAIRS or thing.text in _WORDS for thing in things):
        return True
    turned = {"right of": "left of", "below": "above"}
    for claim in claims.relations:
        first, second = things[claim.subject].shape, things[claim.object].shape
        if claim.relation in turned:
            first, second = second, first
        if (first, turned.get(claim.relation, claim.relation), second) in _TRIPLES:
            return True
    return False
