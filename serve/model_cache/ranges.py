"""In which pieces an object is read: some MiB each, several at once, a part always in one hand."""

from __future__ import annotations

from dataclasses import dataclass

PIECE_BYTES = 32 << 20
"""About: long enough that a request costs nothing beside it, short enough for many at once."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of an object.

    Attributes:
        begin: Of the first.
        length: How many.
    """

    begin: int
    length: int

    @property
    def header(self) -> str:
        """As HTTP asks for it (RFC 9110, 14.2)."""
        return f"bytes={self.begin}-{self.begin + self.length - 1}"


def ranges_of(size: int, part_bytes: int | None) -> list[Range]:
    """Return the ranges that make up an object, in order; none of an empty one.

    Args:
        size: bytes.
        part_bytes: What a checksum is of, and so is not divided; None: anything may be.
    """
    parts = 1 if part_bytes is None else max(PIECE_BYTES // part_bytes, 1)
    each = PIECE_BYTES if part_bytes is None else parts * part_bytes
    return [Range(begin, min(each, size - begin)) for begin in range(0, size, each)]
