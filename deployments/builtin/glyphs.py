"""Capital letters as thick strokes, so that written words need no font.

A letter lives in a cell 0.72 wide and 1 high, x to the right and y down, in letter heights.
Curves are short straight pieces: at the sizes drawn the eye cannot tell.
"""

import math

import torch

from deployments.builtin.scene import LETTER_WIDTH

STROKE_HALF_WIDTH = 0.085
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Point = tuple[float, float]
Line = tuple[Point, ...]

_L, _R, _C = STROKE_HALF_WIDTH, LETTER_WIDTH - STROKE_HALF_WIDTH, LETTER_WIDTH / 2
_T, _B, _M = STROKE_HALF_WIDTH, 1.0 - STROKE_HALF_WIDTH, 0.5


def _arc(
    x: float, y: float, radius_x: float, radius_y: float, start: float, end: float, pieces: int
) -> Line:
    """Points along an ellipse; angles in degrees, clockwise from the right as drawn."""
    angles = [math.radians(start + (end - start) * k / pieces) for k in range(pieces + 1)]
    return tuple((x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles)


_HALF = (_R - _L) / 2
_TALL = (_B - _T) / 2
_BOWL_TOP = _arc(_R - 0.21, (_T + _M) / 2, 0.21, (_M - _T) / 2, -90, 90, 6)
_BOWL_LOW = _arc(_R - 0.21, (_M + _B) / 2, 0.21, (_B - _M) / 2, -90, 90, 6)
_STEM: Line = ((_L, _T), (_L, _B))

_STROKES: dict[str, tuple[Line, ...]] = {
    "A": (((_L, _B), (_C, _T), (_R, _B)), ((0.19, 0.64), (0.53, 0.64))),
    "B": (_STEM, ((_L, _T), *_BOWL_TOP, (_L, _M)), (*_BOWL_LOW, (_L, _B))),
    "C": (_arc(_C, _M, _HALF, _TALL, -42, -318, 12),),
    "D": (
        ((_L, _B), (_L, _T), (0.3, _T)),
        _arc(0.3, _M, _R - 0.3, _TALL, -90, 90, 8),
        ((0.3, _B), (_L, _B)),
    ),
    "E": (((_R, _T), (_L, _T), (_L, _B), (_R, _B)), ((_L, _M), (0.55, _M))),
    "F": (((_R, _T), (_L, _T), (_L, _B)), ((_L, _M), (0.55, _M))),
    "G": ((*_arc(_C, _M, _HALF, _TALL, -42, -360, 12), (_C + 0.06, _M)),),
    "H": (_STEM, ((_R, _T), (_R, _B)), ((_L, _M), (_R, _M))),
    "I": (((_C, _T), (_C, _B)),),
    "J": (((_R, _T), (_R, 0.66), *_arc(_C, 0.66, _HALF, _B - 0.66, 0, 165, 7)),),
    "K": (_STEM, ((_R, _T), (_L, 0.56)), ((0.24, 0.46), (_R, _B))),
    "L": (((_L, _T), (_L, _B), (_R, _B)),),
    "M": (((_L, _B), (_L, _T), (_C, 0.58), (_R, _T), (_R, _B)),),
    "N": (((_L, _B), (_L, _T), (_R, _B), (_R, _T)),),
    "O": (_arc(_C, _M, _HALF, _TALL, 0, 360, 16),),
    "P": (_STEM, ((_L, _T), *_BOWL_TOP, (_L, _M))),
    "Q": (_arc(_C, _M, _HALF, _TALL, 0, 360, 14), ((0.42, 0.66), (0.65, 0.94))),
    "R": (_STEM, ((_L, _T), *_BOWL_TOP, (_L, _M)), ((0.32, _M), (_R, _B))),
    "S": (
        (
            *_arc(_C, (_T + _M) / 2, _HALF, (_M - _T) / 2, -25, -270, 8),
            *_arc(_C, (_M + _B) / 2, _HALF, (_B - _M) / 2, -90, 155, 8),
        ),
    ),
    "T": (((_L, _T), (_R, _T)), ((_C, _T), (_C, _B))),
    "U": (((_L, _T), (_L, 0.62), *_arc(_C, 0.62, _HALF, _B - 0.62, 180, 0, 8), (_R, _T)),),
    "V": (((_L, _T), (_C, _B), (_R, _T)),),
    "W": (((_L, _T), (0.2, _B), (_C, 0.38), (0.52, _B), (_R, _T)),),
    "X": (((_L, _T), (_R, _B)), ((_R, _T), (_L, _B))),
    "Y": (((_L, _T), (_C, 0.54), (_R, _T)), ((_C, 0.54), (_C, _B))),
    "Z": (((_L, _T), (_R, _T), (_L, _B), (_R, _B)),),
}


def _segments() -> torch.Tensor:
    lists = []
    for letter in LETTERS:
        pieces = [
            (*start, *end)
            for line in _STROKES[letter]
            for start, end in zip(line, line[1:], strict=False)
        ]
        lists.append(pieces)
    longest = max(len(pieces) for pieces in lists)
    # A repeated piece changes no distance.
    return torch.tensor([pieces + [pieces[-1]] * (longest - len(pieces)) for pieces in lists])


# float32 [26, pieces, 4]: x and y of either end
GLYPH_SEGMENTS = _segments()


def glyph_distance(letters: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance in letter heights to each letter's strokes.

    Args:
        letters: int64 [M], index into ``LETTERS``.
        x: float32 [M, height, width], from the cell's left edge.
        y: float32 [M, height, width], from the cell's top edge.

    Returns:
        float32 [M, height, width], negative inside.
    """
    ends = GLYPH_SEGMENTS.to(x.device)[letters][:, :, :, None, None]
    squared = torch.full_like(x, math.inf)
    for piece in range(ends.shape[1]):
        ax, ay, bx, by = ends[:, piece].unbind(1)
        edge_x, edge_y = bx - ax, by - ay
        length = (edge_x**2 + edge_y**2).clamp(min=1e-9)
        dx, dy = x - ax, y - ay
        along = ((dx * edge_x + dy * edge_y) / length).clamp(0.0, 1.0)
        squared = torch.minimum(squared, (dx - along * edge_x) ** 2 + (dy - along * edge_y) ** 2)
    return squared.sqrt() - STROKE_HALF_WIDTH
