"""The shapes as signed distances: negative inside, in units of the half-width.

Coordinates run right (u) and down (v); every shape fills the box [-1, 1] in at least one
direction. The shapes are chosen to stay apart when one token sees 16 px: they differ in symmetry,
holes or the number of corners, and no part is thinner than a quarter of the width.
Formulas for polygon and heart: Inigo Quilez, "2D distance functions".
"""

import math
from collections.abc import Callable

import torch

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Points = tuple[tuple[float, float], ...]


def polygon_distance(u: torch.Tensor, v: torch.Tensor, corners: Points) -> torch.Tensor:
    """Signed distance to a simple closed polygon, same shape and dtype as ``u``."""
    squared = torch.full_like(u, math.inf)
    inside = torch.zeros_like(u, dtype=torch.bool)
    for index, (ax, ay) in enumerate(corners):
        bx, by = corners[index - 1]
        edge_x, edge_y = bx - ax, by - ay
        du, dv = u - ax, v - ay
        along = ((du * edge_x + dv * edge_y) / (edge_x**2 + edge_y**2)).clamp(0.0, 1.0)
        squared = torch.minimum(squared, (du - along * edge_x) ** 2 + (dv - along * edge_y) ** 2)
        if edge_y != 0.0:
            crosses = (v >= min(ay, by)) & (v < max(ay, by)) & (du < dv * (edge_x / edge_y))
            inside = inside ^ crosses
    return torch.where(inside, -1.0, 1.0) * squared.sqrt()


def _polygon(corners: Points) -> Distance:
    return lambda u, v: polygon_distance(u, v, corners)


def _star_corners() -> Points:
    # Fat arms (inner radius 0.47 of the outer): thin tips vanish at latent resolution.
    radii = (1.05, 0.49)
    return tuple(
        (radii[k % 2] * math.sin(math.pi * k / 5), 0.1 - radii[k % 2] * math.cos(math.pi * k / 5))
        for k in range(10)
    )


def _cross_corners(arm: float = 0.33) -> Points:
    quarter = ((arm, -1.0), (arm, -arm), (1.0, -arm))
    corners: list[tuple[float, float]] = []
    for _ in range(4):
        corners += quarter
        quarter = tuple((-y, x) for x, y in quarter)  # type: ignore[assignment]
    return tuple(corners)


def _circle(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.hypot(u, v) - 1.0


def _ring(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.hypot(u, v) - 0.74).abs() - 0.26


def _moon(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # Shifted right by 0.2, so that the crescent's box, not its disc, is centred.
    disc = torch.hypot(u - 0.2, v) - 1.0
    bite = torch.hypot(u - 0.74, v) - 0.8
    return torch.maximum(disc, -bite)


def _heart(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    unit = 0.6036
    x, y = u.abs() * unit, 0.552 - v * unit
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2.0) / 4.0
    diagonal = (x + y).clamp(min=0.0) / 2.0
    body = torch.minimum(x**2 + (y - 1.0) ** 2, (x - diagonal) ** 2 + (y - diagonal) ** 2)
    return torch.where(x + y > 1.0, lobe, body.sqrt() * torch.sign(x - y)) / unit


SHAPE_DISTANCES: dict[str, Distance] = {
    "circle": _circle,
    "square": _polygon(((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))),
    "triangle": _polygon(((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85))),
    "star": _polygon(_star_corners()),
    "heart": _heart,
    "cross": _polygon(_cross_corners()),
    "ring": _ring,
    "moon": _moon,
    # Taught by a LoRA. Overlaps no other shape or letter by more than 0.62 (``templates``).
    "bolt": _polygon(
        (
            (-0.05, -1.0),
            (-0.75, 0.22),
            (-0.12, 0.22),
            (-0.4, 1.0),
            (0.75, -0.28),
            (0.12, -0.28),
            (0.6, -1.0),
        )
    ),
}
