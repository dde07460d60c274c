"""Whether one thing in a picture is what one claim says: the tolerances of the checker.

They are what a person would accept, were decided before the first training run, and are kept:

- a shape is right when it looks more like the stated shape than like any other, overlaps it by
  at least 0.66 after removing place and size, and is not stretched much: a quarter where the name
  promises equal sides (circle, square, ring), two fifths elsewhere;
- a colour is right when it is the nearest of the eleven names for two thirds of the inside;
- a size is right on either side of the middle between what is drawn as small and as large;
- positions and relations follow ``geometry``;
- a word is right when every letter looks most like the stated one.
"""

from deployments.builtin.claims import WORD, ThingClaim
from deployments.builtin.geometry import position_holds, relation_holds
from deployments.builtin.scene import frame_scale
from deployments.builtin.seen import Seen

SMALL_AT_MOST_PX = 37.0
LARGE_AT_LEAST_PX = 35.0
MINIMUM_OVERLAP = 0.66
MAXIMUM_STRETCH = 1.4
MAXIMUM_STRETCH_EVEN = 1.25
EVEN_SHAPES = frozenset({"circle", "square", "ring"})
MINIMUM_PURITY = 0.66

Attributes = dict[str, bool]


def own_attributes(claim: ThingClaim, seen: Seen | None, height: int, width: int) -> Attributes:
    """Each attribute that the claim states, and whether the thing has it.

    Args:
        claim: what is said; its count is not looked at.
        seen: the thing that may play it; None when there is none, and nothing holds.
        height: frame height in pixels.
        width: frame width in pixels.
    """
    found: Attributes = {}
    if claim.shape == WORD:
        found["word"] = seen is not None and (claim.text is None or seen.text == claim.text)
    elif claim.shape is not None:
        found["shape"] = seen is not None and _is_shape(seen, claim.shape)
    if claim.color is not None:
        found["color"] = (
            seen is not None and seen.color == claim.color and seen.purity >= MINIMUM_PURITY
        )
    if claim.size is not None:
        found["size"] = seen is not None and _is_size(seen, claim, frame_scale(height, width))
    if claim.position is not None:
        found["position"] = seen is not None and position_holds(
            claim.position, seen.center[0] / width, seen.center[1] / height
        )
    return found


def related(relation: str, subject: Seen | None, target: Seen | None, scale: float) -> bool:
    """Whether both are there and the relation holds between their middles."""
    if subject is None or target is None:
        return False
    (x0, y0), (x1, y1) = subject.center, target.center
    return relation_holds(relation, x1 - x0, y1 - y0, scale)


def merge(rows: list[Attributes]) -> Attributes:
    """A category is right when it is right everywhere that it is stated."""
    merged: Attributes = {}
    for row in rows:
        for category, right in row.items():
            merged[category] = merged.get(category, True) and right
    return merged


def _is_shape(seen: Seen, shape: str) -> bool:
    most = MAXIMUM_STRETCH_EVEN if shape in EVEN_SHAPES else MAXIMUM_STRETCH
    return (
        seen.shape.name == shape
        and seen.shape.overlap >= MINIMUM_OVERLAP
        and 1 / most <= seen.shape.stretch <= most
    )


def _is_size(seen: Seen, claim: ThingClaim, scale: float) -> bool:
    half_width = seen.half_width_px(claim.shape) / scale
    if claim.size == "small":
        return half_width <= SMALL_AT_MOST_PX
    return half_width >= LARGE_AT_LEAST_PX
