"""How a picture will be decoded, or encoded, and in how much memory: settled before it starts.

Whole is quickest, and its memory grows with the picture: by this account 2.6 GiB at 1024x1024 and
10.5 at 2048x2048 for SD3.5's VAE. What the budget does not hold is decoded in tiles
(`deployments.sd3.tiled_decode`): each layer's activations are kept once, on the device or, where
even that is too much, in the host's memory; what the budget leaves beside them sets the size of the
tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from serve.errors import StageFailed

Tiling = Literal["auto", "always", "off"]

GIB = 1 << 30

# Activations of a block's widest layer that live at a time, libraries' workspaces included: a
# convolution's input and output, both again in the layout that its kernel wants, and what they
# came from.
_WHOLE_COPIES = 5
_ENCODED_COPIES = 6  # measured: 6.03 at 512x512, 1024x1024 and 768x1344 on an H100
_TILE_COPIES = 6
_MIDDLE_COPIES = 10  # normalised, q, k, v and what was attended, some of it in float32
ATTENTION_PART_BYTES = GIB // 4  # of scores, where no kernel does without writing them down
_MARGIN = 4  # what the convolutions of a tile read beyond it, on both sides together
_SMALLEST_TILE, _LARGEST_TILE, _TILE_MULTIPLE = 32, 512, 16
_FRUGAL_TILE = 128  # smaller ones save little beside what is never tiled
_HEADROOM = 1.05  # an allocator rounds up


@dataclass(frozen=True)
class TilingSettings:
    """What an operator says about decoding."""

    mode: Tiling = "auto"
    memory_bytes: int = 3 * GIB  # on the device, the VAE's weights included


@dataclass(frozen=True)
class _Block:
    before: int  # channels in
    after: int  # channels out
    scale: int  # of its activations' sides to the latents'

    @property
    def widest(self) -> int:
        return max(self.before, self.after)

    @property
    def kept(self) -> float:
        """Channels kept between tiles: input before it is enlarged, hidden, output."""
        return self.before / 4 + 2 * self.after


@dataclass(frozen=True)
class DecoderShape:
    """What the memory of a VAE's decoder depends on.

    Args:
        block_out_channels: Of its configuration, which counts from the picture inwards.
        element_bytes: Of activations.
    """

    block_out_channels: tuple[int, ...]
    element_bytes: int

    def whole_bytes(self, height: int, width: int) -> int:
        """Return the peak of decoding latents of these sides at once, beside the weights."""
        widest = max(block.widest * block.scale**2 for block in self._blocks())
        return self._bytes(_WHOLE_COPIES * widest * height * width)

    def kept_bytes(self, height: int, width: int) -> int:
        """Return the most that waits for its turn while a tile is computed."""
        most = max(block.kept * block.scale**2 for block in self._blocks())
        return self._bytes(most * height * width)

    def middle_bytes(self, height: int, width: int) -> int:
        """Return the peak of what is never tiled: attention, at the latents' size."""
        tokens = height * width
        scores = min(ATTENTION_PART_BYTES, 8 * tokens * tokens)
        return self._bytes(_MIDDLE_COPIES * self.block_out_channels[-1] * tokens) + scores

    def tiled_bytes(self, height: int, width: int, tile: int, on_host: bool) -> int:
        """Return the peak of decoding in tiles, beside the weights."""
        area = (tile + _MARGIN) ** 2
        tiles = max(
            (0 if on_host else block.kept * block.scale**2 * height * width)
            + _TILE_COPIES * block.widest * area
            for block in self._blocks()
        )
        last = self._blocks()[-1].scale
        image = 3 * height * width * last**2
        return max(self.middle_bytes(height, width), self._bytes(tiles + image))

    def encoded_whole_bytes(self, height: int, width: int) -> int:
        """Return the peak of encoding a picture to latents of these sides, beside the weights."""
        widest = max(after * scale**2 for _, after, scale in self._encoder_blocks())
        return self._bytes(_ENCODED_COPIES * widest * height * width)

    def encoded_kept_bytes(self, height: int, width: int) -> int:
        """Return the most that waits for its turn while a tile is computed."""
        most = max(
            (before + 2 * after) * scale**2 for before, after, scale in self._encoder_blocks()
        )
        return self._bytes(most * height * width)

    def encoded_tiled_bytes(self, height: int, width: int, tile: int, on_host: bool) -> int:
        """Return the peak of encoding in tiles, beside the weights."""
        area = (tile + _MARGIN) ** 2
        tiles = max(
            (0 if on_host else (before + 2 * after) * scale**2 * height * width)
            + _TILE_COPIES * after * area
            for before, after, scale in self._encoder_blocks()
        )
        image = 3 * height * width * 4 ** (len(self.block_out_channels) - 1)
        return max(self.middle_bytes(height, width), self._bytes(tiles + image))

    def _encoder_blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield channels in, where those are another layer than the ones out, out, and scale."""
        before = 0
        for at, after in enumerate(self.block_out_channels):
            yield before, after, 2 ** (len(self.block_out_channels) - 1 - at)
            before = after

    def _blocks(self) -> list[_Block]:
        after = self.block_out_channels[::-1]
        before = (after[0], *after)
        return [_Block(*each, 2**at) for at, each in enumerate(zip(before, after, strict=False))]

    def _bytes(self, numbers: float) -> int:
        return math.ceil(numbers * self.element_bytes * _HEADROOM)


@dataclass(frozen=True)
class DecodePlan:
    """One picture's way through the decoder, or the encoder."""

    tile: int | None  # side, in activations of whichever layer; None: the picture whole
    on_host: bool  # activations wait for their turn in the host's memory
    device_bytes: int  # peak, beside the weights
    host_bytes: int = 0


def frugal_plan(shape: DecoderShape, height: int, width: int) -> DecodePlan:
    """Return a plan that takes little of the device, whatever that costs in time.

    Args:
        shape: Of the decoder.
        height: Of the latents.
        width: Of the latents.
    """
    return _tiled_decode(shape, height, width)(_FRUGAL_TILE, True)


def plan_decode(
    shape: DecoderShape,
    height: int,
    width: int,
    memory_bytes: int,
    mode: Tiling = "auto",
) -> DecodePlan:
    """Choose how to decode one picture.

    Args:
        shape: Of the decoder.
        height: Of the latents.
        width: Of the latents.
        memory_bytes: That decoding may take on the device, beside the weights.
        mode: `auto` tiles what would not fit whole; `always` tiles; `off` never does.

    Raises:
        StageFailed: Not even the smallest tiles fit.
    """
    whole = shape.whole_bytes(height, width)
    tiled = _tiled_decode(shape, height, width)
    return _chosen(whole, tiled, memory_bytes, mode, "Decoding", f"latents of {height}x{width}")


def plan_encode(
    shape: DecoderShape,
    height: int,
    width: int,
    memory_bytes: int,
    mode: Tiling = "auto",
) -> DecodePlan:
    """Choose how to encode one picture; arguments and errors as `plan_decode`."""
    whole = shape.encoded_whole_bytes(height, width)

    def tiled(tile: int, on_host: bool) -> DecodePlan:
        kept = shape.encoded_kept_bytes(height, width) if on_host else 0
        device = shape.encoded_tiled_bytes(height, width, tile, on_host)
        return DecodePlan(tile, on_host, device, kept)

    return _chosen(whole, tiled, memory_bytes, mode, "Encoding", f"latents of {height}x{width}")


def _tiled_decode(
    shape: DecoderShape, height: int, width: int
) -> Callable[[int, bool], DecodePlan]:
    def tiled(tile: int, on_host: bool) -> DecodePlan:
        kept = shape.kept_bytes(height, width) if on_host else 0
        return DecodePlan(tile, on_host, shape.tiled_bytes(height, width, tile, on_host), kept)

    return tiled


def _chosen(
    whole: int,
    tiled: Callable[[int, bool], DecodePlan],
    memory_bytes: int,
    mode: Tiling,
    doing: str,
    what: str,
) -> DecodePlan:
    if mode == "off" or (mode == "auto" and whole <= memory_bytes):
        return DecodePlan(None, False, whole)
    for on_host in (False, True):
        for tile in range(_LARGEST_TILE, _SMALLEST_TILE - 1, -_TILE_MULTIPLE):
            plan = tiled(tile, on_host)
            if plan.device_bytes <= memory_bytes:
                return plan
    least = tiled(_SMALLEST_TILE, True).device_bytes
    raise StageFailed(
        f"{doing} {what} takes {least / GIB:.2f} GiB or more beside the VAE's weights, and"
        f" {max(memory_bytes, 0) / GIB:.2f} GiB may be used.",
        field="latents",
        value=what,
        allowed="a smaller picture, or more memory for this stage",
    )
