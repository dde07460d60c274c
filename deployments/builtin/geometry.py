"""When is a thing "on the left", and when is one "above" another: the world's only definitions.

Used to keep held-out arrangements out of training and to judge pictures. The tolerances are what
a person accepts: well past the middle for a position, more along the axis than half of what lies
across it for a relation. The layout draws every stated arrangement clearly inside them.
"""

_NEAR, _FAR = 0.42, 0.58
_CENTER_LOW, _CENTER_HIGH = 0.36, 0.64
_RELATION_STEP_PX = 20.0


def position_holds(position: str, x: float, y: float) -> bool:
    """Whether a centre at fractions (x, y) of width and height is at a named position."""
    if position == "center":
        return _CENTER_LOW < x < _CENTER_HIGH and _CENTER_LOW < y < _CENTER_HIGH
    tests = {"left": x < _NEAR, "right": x > _FAR, "top": y < _NEAR, "bottom": y > _FAR}
    return all(tests[side] for side in position.split())


def relation_holds(relation: str, offset_x: float, offset_y: float, scale: float) -> bool:
    """Whether a thing is <relation> another.

    Args:
        relation: one of ``RELATIONS``.
        offset_x: the other's centre minus the thing's, pixels to the right.
        offset_y: the other's centre minus the thing's, pixels down.
        scale: ``frame_scale`` of the picture.
    """
    along, across = {
        "left of": (offset_x, offset_y),
        "right of": (-offset_x, offset_y),
        "above": (offset_y, offset_x),
        "below": (-offset_y, offset_x),
    }[relation]
    return along >= _RELATION_STEP_PX * scale and along >= 0.5 * abs(across)
