"""How a row is cut into the power-of-two blocks that Triton can hold.

One block alone would waste up to half its lanes: 4096 for Large's 2432 columns. Two waste little:
2048 and 512. Every width of SD3.5 (1536, 2432, 6144, 9728) fits within 5 % or exactly.
"""

from __future__ import annotations


def two_blocks(columns: int) -> tuple[int, int]:
    """Return the largest power of two below `columns`, and the least that covers the rest."""
    first = 1 << ((columns - 1).bit_length() - 1)
    return first, 1 << (columns - first - 1).bit_length()
