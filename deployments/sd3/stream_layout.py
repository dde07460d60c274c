"""Where a batch's tokens lie: one matrix, all image tokens first, then all text tokens.

So each stream is one block of rows (one matrix product for all requests of a batch), and what is
done to every token, whatever its stream, is one pass over one matrix. Between the streams may lie a
few rows of nothing: FP8 products want their row scales to begin at a multiple of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

_ALIGNED_ROWS = 16


@dataclass(frozen=True)
class StreamLayout:
    """Rows of the token matrix.

    Attributes:
        batch: rows of the model's batch, B.
        image: image tokens of each, N.
        text: text tokens of each, T; 0 where the text stream has no part.
    """

    batch: int
    image: int
    text: int

    @property
    def image_rows(self) -> slice:
        """The image tokens, one batch row after the other."""
        return slice(0, self.batch * self.image)

    @property
    def text_rows(self) -> slice:
        """The text tokens, likewise."""
        return slice(self.text_start, self.rows)

    @property
    def text_start(self) -> int:
        """The first row of the text stream."""
        rows = self.batch * self.image
        return rows + (-rows % _ALIGNED_ROWS if self.text else 0)

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.text_start + self.batch * self.text

    @property
    def tokens(self) -> int:
        """Tokens of one batch row."""
        return self.image + self.text

    @property
    def image_only(self) -> StreamLayout:
        """The same batch without its text stream."""
        return replace(self, text=0)


class PerStream(NamedTuple):
    """One thing for the image stream and one for the text stream (None where it has no part)."""

    image: Tensor
    text: Tensor | None

    def over(self, layout: StreamLayout) -> Iterator[tuple[slice, Tensor]]:
        """Yield each present stream's rows with its tensor."""
        yield layout.image_rows, self.image
        if layout.text and self.text is not None:
            yield layout.text_rows, self.text
