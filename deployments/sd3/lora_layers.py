"""Low-rank branches beside Linear layers: y += weight * up(down(x)), another pair for each row.

LoRA (Hu et al. 2021, arXiv 2106.09685). Weights stay as they are, so FP8 ones do, and rows of one
batch may differ in what adapts them. Ranks lie in pages of 16, the least that a tensor core
multiplies; a row names the pages that adapt it, each with a weight. So one file is held once,
whoever uses it with whatever weight and beside whatever other, and one file of rank 256 or sixteen
of rank 16 take the same room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.sd3.fp8 import QuantizedRows
from deployments.sd3.stream_layout import StreamLayout

PAGE_RANKS = 16

PageUse = tuple[int, float]
"""A page and the weight with which it adapts a row."""


@dataclass(frozen=True)
class RowLoras:
    """Which pages adapt each row of a batch, on the device; inputs of a captured graph.

    Attributes:
        pages: int32 [B, most]; what lies behind a row's count is not read.
        weights: float32 [B, most].
        counts: int32 [B], pages of each row.
        uses: The same on the host, for the plain way; None while a graph is captured.
    """

    pages: Tensor
    weights: Tensor
    counts: Tensor
    uses: tuple[tuple[PageUse, ...], ...] | None

    @classmethod
    def of(cls, uses: Sequence[Sequence[PageUse]], most: int, device: torch.device) -> RowLoras:
        """Copy what the host knows to the device.

        Args:
            uses: Of each row; empty where nothing adapts it.
            most: Pages that a row may have.
            device: Of the model.

        Raises:
            ValueError: A row has more.
        """
        if any(len(row) > most for row in uses):
            raise ValueError(f"at most {most} pages adapt a row")
        shape = len(uses), most
        pages, weights = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
        for row, of_row in enumerate(uses):
            for at, (page, weight) in enumerate(of_row):
                pages[row, at], weights[row, at] = page, weight
        counts = torch.tensor([len(row) for row in uses], dtype=torch.int32)
        tensors = [pages, weights, counts]
        if device.type == "cuda":
            tensors = [each.pin_memory().to(device, non_blocking=True) for each in tensors]
        return cls(tensors[0], tensors[1], tensors[2], tuple(tuple(row) for row in uses))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pages, weights and counts."""
        return self.pages, self.weights, self.counts


@dataclass(frozen=True)
class Adaptable:
    """Linear layers that a side branch stands beside as one.

    Attributes:
        names: Of the layers: [stream][part], where one product gives several layers' outputs side
            by side.
        inputs: Columns that all of them read.
        columns: That each part writes.
    """

    names: tuple[tuple[str, ...], ...]
    inputs: int
    columns: tuple[int, ...]

    @property
    def down_elements(self) -> int:
        """Numbers in a page's down matrices of one stream."""
        return len(self.columns) * PAGE_RANKS * self.inputs

    @property
    def up_elements(self) -> int:
        """Numbers in a page's up matrices of one stream."""
        return sum(self.columns) * PAGE_RANKS


class SideBranch:
    """The branch beside one product of each stream.

    Args:
        of: What it adapts.
        down: For each stream [pages, parts, 16, inputs].
        up: For each stream [pages, columns of all parts, 16].
        touched: int32 [2, pages]: not 0 where a page adapts a stream's layers here.
    """

    def __init__(
        self, of: Adaptable, down: Sequence[Tensor], up: Sequence[Tensor], touched: Tensor
    ) -> None:
        self.of = of
        self.down = tuple(down)
        self.up = tuple(up)
        self.touched = touched
        self.held: tuple[set[int], set[int]] = set(), set()  # what `touched` says, on the host
        self.unit = math.gcd(*of.columns)
        parts = [part for part, columns in enumerate(of.columns) for _ in range(columns)]
        self.part_of_unit = torch.tensor(
            parts[:: self.unit], dtype=torch.int32, device=touched.device
        )

    def add_(
        self, out: Tensor, x: Tensor | QuantizedRows, layout: StreamLayout, loras: RowLoras
    ) -> None:
        """Add the branch of each row to a product's output, in place.

        Args:
            out: [rows, columns of all parts], contiguous.
            x: [rows, inputs], what the product read.
            layout: Whose the rows are.
            loras: Of the batch's rows. A row that nothing adapts is not even read.
        """
        if out.is_cuda:
            from deployments.sd3.kernels.lora import add_low_rank_cuda_

            add_low_rank_cuda_(self, out, x, layout, loras)
        else:
            self._add_plainly(out, x, layout, loras)

    def pending(self, x: Tensor | QuantizedRows, layout: StreamLayout, loras: RowLoras) -> Pending:
        """Bring the branch of each row down to its ranks, on a CUDA device.

        Args:
            x: [rows, inputs], what the product read.
            layout: Whose the rows are.
            loras: Of the batch's rows.
        """
        from deployments.sd3.kernels.lora import down

        return Pending(self, down(self, x, layout, loras), loras)

    def _add_plainly(
        self, out: Tensor, x: Tensor | QuantizedRows, layout: StreamLayout, loras: RowLoras
    ) -> None:
        assert loras.uses is not None
        streams = [(0, layout.image_rows, layout.image), (1, layout.text_rows, layout.text)]
        for stream, rows, tokens in streams[: 2 if layout.text else 1]:
            for row, uses in enumerate(loras.uses):
                own = slice(rows.start + row * tokens, rows.start + (row + 1) * tokens)
                for page, weight in uses:
                    if page in self.held[stream]:
                        self._add_page(out[own], _plain(x, own, out.dtype), stream, page, weight)

    def _add_page(self, out: Tensor, x: Tensor, stream: int, page: int, weight: float) -> None:
        down, up = self.down[stream][page], self.up[stream][page]
        hidden = (x.to(down.dtype) @ down.flatten(0, 1).t()).mul_(weight)  # [tokens, parts * 16]
        starts = [sum(self.of.columns[:part]) for part in range(len(self.of.columns))]
        for part, (start, columns) in enumerate(zip(starts, self.of.columns, strict=True)):
            ranks = hidden[:, part * PAGE_RANKS : (part + 1) * PAGE_RANKS]
            up_of_part = up[start : start + columns].t()
            # In float32 where that is what INT8 products write.
            out[:, start : start + columns].addmm_(ranks.to(out.dtype), up_of_part.to(out.dtype))


@dataclass(frozen=True)
class Pending:
    """A branch that was brought down to its ranks; whoever reads the product's output adds it.

    Attributes:
        branch: Beside the product.
        ranks: As `deployments.sd3.kernels.lora.down` returns them.
        loras: Of the batch's rows.
    """

    branch: SideBranch
    ranks: Tensor
    loras: RowLoras


def _plain(x: Tensor | QuantizedRows, rows: slice, dtype: torch.dtype) -> Tensor:
    if isinstance(x, QuantizedRows):
        own = x[rows]
        return (own.values.float() * own.scale).to(dtype)
    return x[rows]
