"""The room for LoRAs of one transformer: pages of 16 ranks of everything that can be adapted.

Taken once, so its size is known before it is taken and captured graphs keep its addresses. A page
is one piece of memory: filling it is one copy, beside forwards whose rows use other pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deployments.sd3.lora_layers import PAGE_RANKS, Adaptable, SideBranch
from deployments.sd3.upload import Upload

MOST_RANKS = 256
"""Of all LoRAs that adapt one request, each counted in whole pages."""

_ALIGNED = 128  # elements
_STREAMS = 2


@dataclass(frozen=True)
class LowRank:
    """What a file says of one layer: W + up @ down, its own scale within `up`."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]


@dataclass(frozen=True)
class HostPage:
    """A page's content, ready to be copied."""

    values: Tensor  # [elements]
    touched: tuple[tuple[bool, bool], ...]  # of each branch, by stream


def pages_of(rank: int) -> int:
    """Return the pages that a rank takes."""
    return math.ceil(rank / PAGE_RANKS)


class LoraArena:
    """Pages for the side branches of a model.

    Args:
        adaptable: Everything that can be adapted.
        pages: How many.
        device: Of the model.
        dtype: That it computes in.
    """

    def __init__(
        self, adaptable: Sequence[Adaptable], pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.pages = pages
        self.most_a_row = min(pages, MOST_RANKS // PAGE_RANKS)
        self._elements, self._places = _places(adaptable)
        self._values = torch.zeros((pages, self._elements), dtype=dtype, device=device)
        self._touched = torch.zeros(
            (len(adaptable), _STREAMS, pages), dtype=torch.int32, device=device
        )
        # Of its own, for a forward would hold up a copy behind it.
        on_card = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if on_card else None  # type: ignore[no-untyped-call]
        self.branches = [
            SideBranch(
                of,
                [self._view(at, len(of.columns), PAGE_RANKS, of.inputs) for at, _ in places],
                [self._view(at, sum(of.columns), PAGE_RANKS) for _, at in places],
                self._touched[index],
            )
            for index, (of, places) in enumerate(zip(adaptable, self._places, strict=True))
        ]

    @staticmethod
    def page_bytes(adaptable: Sequence[Adaptable], dtype: torch.dtype) -> int:
        """Return what a page takes, before any is."""
        return _places(adaptable)[0] * dtype.itemsize

    @property
    def bytes(self) -> int:
        """Memory of all pages."""
        return self._values.nbytes + self._touched.nbytes

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that can be adapted."""
        return frozenset(
            name for each in self.branches for stream in each.of.names for name in stream
        )

    def pack(self, layers: Mapping[str, LowRank]) -> list[HostPage]:
        """Lay out a file's layers as pages on the host; layers without a place are left out.

        Args:
            layers: By diffusers' names of the transformer's modules, shapes as there.
        """
        count = pages_of(max((len(each.down) for each in layers.values()), default=0))
        return [self._packed(layers, number) for number in range(count)]

    def _packed(self, layers: Mapping[str, LowRank], number: int) -> HostPage:
        values = torch.zeros(self._elements, dtype=self._values.dtype)
        ranks = slice(number * PAGE_RANKS, (number + 1) * PAGE_RANKS)
        touched = []
        for branch, places in zip(self.branches, self._places, strict=True):
            of, here = branch.of, [False, False]
            for stream, (names, (down_at, up_at)) in enumerate(zip(of.names, places, strict=True)):
                down = values[down_at : down_at + of.down_elements]
                down = down.view(len(of.columns), PAGE_RANKS, of.inputs)
                up = values[up_at : up_at + of.up_elements].view(-1, PAGE_RANKS)
                start = 0
                for part, (name, columns) in enumerate(zip(names, of.columns, strict=True)):
                    layer = layers.get(name)
                    if layer is not None and (count := len(layer.down[ranks])):
                        here[stream] = True
                        down[part, :count] = layer.down[ranks]
                        up[start : start + columns, :count] = layer.up[:, ranks]
                    start += columns
            touched.append((here[0], here[1]))
        return HostPage(values, tuple(touched))

    def write(self, page: int, content: HostPage) -> None:
        """Fill a page that no row uses; returns once it has arrived. From one thread at a time."""
        with torch.cuda.stream(self._stream):  # nothing where there is none
            with Upload(self._values.device, [content.values]) as upload:
                upload(content.values, self._values[page])
            self._touched[:, :, page].copy_(torch.tensor(content.touched, dtype=torch.int32))
        if self._stream is not None:
            self._stream.synchronize()
        for branch, touched in zip(self.branches, content.touched, strict=True):
            for held, here in zip(branch.held, touched, strict=True):
                held.discard(page)
                if here:
                    held.add(page)

    def _view(self, at: int, *shape: int) -> Tensor:
        return self._values[:, at : at + math.prod(shape)].view(self.pages, *shape)


def _places(adaptable: Sequence[Adaptable]) -> tuple[int, list[list[tuple[int, int]]]]:
    """Return a page's elements and where each branch's down and up lie in it, by stream."""
    at, places = 0, []
    for of in adaptable:
        streams = []
        for _ in of.names:
            down = at
            up = _aligned(down + of.down_elements)
            at = _aligned(up + of.up_elements)
            streams.append((down, up))
        places.append(streams)
    return at, places


def _aligned(at: int) -> int:
    return -(-at // _ALIGNED) * _ALIGNED
