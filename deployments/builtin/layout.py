"""Where things go: centres for boxes so that nothing overlaps and stated arrangements are plain.

All functions work on half extents in pixels and return centres, or None when the frame is too
small for what was asked; the caller then draws other sizes.
"""

import random

MARGIN_PX = 6.0
GAP_PX = 9.0

Extents = tuple[float, float]
Center = tuple[float, float]


def _within(low: float, high: float, rng: random.Random) -> float | None:
    return None if high < low else low + (high - low) * rng.random()


def _band(side: int, half: float, length: float, rng: random.Random) -> float | None:
    """A coordinate in the low (-1), middle (0) or high (1) part of an axis."""
    edge = half + MARGIN_PX
    if side < 0:
        return None if edge > 0.38 * length else _within(edge, max(edge, 0.34 * length), rng)
    if side > 0:
        mirrored = _band(-1, half, length, rng)
        return None if mirrored is None else length - mirrored
    return _within(max(edge, 0.46 * length), min(length - edge, 0.54 * length), rng)


def place(
    position: str | None, half: Extents, height: int, width: int, rng: random.Random
) -> Center | None:
    """A centre at a named position, or anywhere in the frame for None."""
    if position is None:
        x = _within(half[0] + MARGIN_PX, width - half[0] - MARGIN_PX, rng)
        y = _within(half[1] + MARGIN_PX, height - half[1] - MARGIN_PX, rng)
    else:
        x = _band(("right" in position) - ("left" in position), half[0], width, rng)
        y = _band(("bottom" in position) - ("top" in position), half[1], height, rng)
    return None if x is None or y is None else (x, y)


def apart(first: Center, first_half: Extents, second: Center, second_half: Extents) -> bool:
    """Whether two boxes keep the gap between them."""
    return (
        abs(first[0] - second[0]) >= first_half[0] + second_half[0] + GAP_PX
        or abs(first[1] - second[1]) >= first_half[1] + second_half[1] + GAP_PX
    )


def scatter(
    positions: list[str | None],
    halves: list[Extents],
    height: int,
    width: int,
    rng: random.Random,
    tries_each: int = 12,
) -> list[Center] | None:
    """Centres at named positions or anywhere, none closer than the gap."""
    centers: list[Center] = []
    for position, half in zip(positions, halves, strict=True):
        for _ in range(tries_each):
            center = place(position, half, height, width, rng)
            if center is None:
                return None
            if all(apart(center, half, *other) for other in zip(centers, halves, strict=False)):
                centers.append(center)
                break
        else:
            return None
    return centers


def row(
    halves: list[Extents], horizontal: bool, height: int, width: int, rng: random.Random
) -> list[Center] | None:
    """Centres from left to right (or top to bottom), each plainly along the axis from the last."""
    axis = 0 if horizontal else 1
    length, breadth = (width, height) if horizontal else (height, width)
    slack = length - 2 * MARGIN_PX - GAP_PX * (len(halves) - 1) - 2 * sum(h[axis] for h in halves)
    if slack < 0:
        return None
    shares = [rng.random() + 0.1 for _ in range(len(halves) + 1)]
    unit = slack / sum(shares)
    along: list[float] = []
    edge = MARGIN_PX
    for half, share in zip(halves, shares, strict=False):
        edge += share * unit + half[axis]
        along.append(edge)
        edge += half[axis] + GAP_PX
    across: list[float] = []
    for index, half in enumerate(halves):
        low, high = half[1 - axis] + MARGIN_PX, breadth - half[1 - axis] - MARGIN_PX
        if index:
            reach = 0.6 * (along[index] - along[index - 1])
            low, high = max(low, across[-1] - reach), min(high, across[-1] + reach)
        offset = _within(low, high, rng)
        if offset is None:
            return None
        across.append(offset)
    pairs = zip(along, across, strict=True)
    return [(a, b) if horizontal else (b, a) for a, b in pairs]


def beside_and_across(
    halves: list[Extents],
    sides: tuple[int, int],
    height: int,
    width: int,
    rng: random.Random,
) -> list[Center] | None:
    """Three centres: the second beside the first, the third above or below the first.

    Args:
        halves: half extents of the three boxes.
        sides: +1 when the second is to the right, and +1 when the third is below; else -1.
        height: frame height in pixels.
        width: frame width in pixels.
        rng: source of randomness.
    """
    first = place(None, halves[0], height, width, rng)
    if first is None:
        return None
    step_x = halves[0][0] + halves[1][0] + GAP_PX + 30.0 * rng.random()
    step_y = halves[0][1] + halves[2][1] + GAP_PX + 30.0 * rng.random()
    second = (first[0] + sides[0] * step_x, first[1] + 0.4 * step_x * (rng.random() - 0.5))
    third = (first[0] + 0.4 * step_y * (rng.random() - 0.5), first[1] + sides[1] * step_y)
    fits = all(
        half[0] + MARGIN_PX <= x <= width - half[0] - MARGIN_PX
        and half[1] + MARGIN_PX <= y <= height - half[1] - MARGIN_PX
        for (x, y), half in zip((second, third), halves[1:], strict=True)
    )
    if not fits or not apart(second, halves[1], third, halves[2]):
        return None
    return [first, second, third]
