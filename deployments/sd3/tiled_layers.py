"""Layers of a VAE that go over a picture tile by tile, to the same values as whole.

Usual tiling runs the whole network on overlapping tiles and blends their seams, which hides that
each tile was normalised, and attended, by itself. Here every layer goes over all tiles before the
next begins: group statistics are those of the whole picture, attention at the latents' size is not
tiled at all, and a tile reads its neighbours' true values around it. So there are no seams to
blend, and nothing is computed twice but the convolution after each enlargement. The price is that a
layer's activations are kept, once, on the device or in the host's memory.

Layers are those of diffusers' `Encoder` and `Decoder` (`models/autoencoders/vae.py`) and their
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deployments.sd3.channel_statistics import ChannelStatistics
from deployments.sd3.decode_plan import ATTENTION_PART_BYTES


class Box(NamedTuple):
    """A part of a picture, in activations of the layer at hand; the ends are beyond it."""

    top: int
    left: int
    bottom: int
    right: int

    def grown(self, height: int, width: int) -> Box:
        """Return it with the ring of one that a 3 x 3 convolution reads, within the picture."""
        return Box(
            max(self.top - 1, 0),
            max(self.left - 1, 0),
            min(self.bottom + 1, height),
            min(self.right + 1, width),
        )

    def of(self, values: Tensor, top: int = 0, left: int = 0) -> Tensor:
        """Return this part of a tensor [1, C, h, w] whose first activation is at (top, left)."""
        rows = slice(self.top - top, self.bottom - top)
        return values[:, :, rows, self.left - left : self.right - left]


class Layer:
    """One layer's activations of the whole picture, wherever they are kept.

    Args:
        values: [1, C, h, w].
        enlarge: Upsampling that happens while a tile is read, so that its result, the largest of
            all, never exists whole.
    """

    def __init__(self, values: Tensor, enlarge: nn.Module | None = None) -> None:
        self.values = values
        self.enlarge = enlarge
        scale = 1 if enlarge is None else 2
        self.height, self.width = scale * values.shape[2], scale * values.shape[3]

    def read(self, box: Box, device: torch.device) -> Tensor:
        """Return a part of it on a device."""
        if self.enlarge is None:
            return box.of(self.values).to(device)
        ring = box.grown(self.height, self.width)
        source = Box(ring.top // 2, ring.left // 2, -(-ring.bottom // 2), -(-ring.right // 2))
        enlarged = self.enlarge(source.of(self.values).to(device))
        return box.of(enlarged, 2 * source.top, 2 * source.left)

    def write(self, box: Box, tile: Tensor) -> None:
        """Set a part of it."""
        box.of(self.values).copy_(tile)


class TiledLayers:
    """Carries layers out in tiles.

    Args:
        tile: Side of a tile, in activations of whichever layer.
        device: Where layers are computed.
        dtype: Of activations.
        on_host: Keep activations in the host's memory.
    """

    def __init__(self, tile: int, device: torch.device, dtype: torch.dtype, on_host: bool) -> None:
        self.tile = tile
        self.device = device
        self.dtype = dtype
        self.keep_on = torch.device("cpu") if on_host else device

    def measured(self, layer: Layer) -> ChannelStatistics:
        """Return a layer's statistics."""
        statistics = ChannelStatistics()
        for box in self.boxes(layer):
            statistics.add(layer.read(box, self.device))
        return statistics

    def resnet(
        self, block: Any, layer: Layer, statistics: ChannelStatistics
    ) -> tuple[Layer, ChannelStatistics]:
        """Run diffusers' `ResnetBlock2D`, in place where it can.

        Args:
            block: Of the network.
            layer: What goes in.
            statistics: Of that.

        Returns:
            What comes out, and its statistics.
        """
        hidden = self.new_layer(block.out_channels, layer)
        in_place = block.conv_shortcut is None and layer.enlarge is None
        after = layer if in_place else self.new_layer(block.out_channels, layer)
        normalise = statistics.normaliser(block.norm1)
        between = ChannelStatistics()
        for box in self.boxes(layer):
            ring = box.grown(layer.height, layer.width)
            tile = layer.read(ring, self.device)
            if not in_place:
                own = box.of(tile, ring.top, ring.left)
                after.write(box, own if block.conv_shortcut is None else block.conv_shortcut(own))
            made = box.of(block.conv1(normalise(tile)), ring.top, ring.left)
            between.add(made)
            hidden.write(box, made)
            del tile, made  # or they would live beside the next ones
        normalise, following = between.normaliser(block.norm2), ChannelStatistics()
        for box in self.boxes(layer):
            ring = box.grown(layer.height, layer.width)
            made = block.conv2(normalise(hidden.read(ring, self.device)))
            made = after.read(box, self.device) + box.of(made, ring.top, ring.left)
            following.add(made)
            after.write(box, made)
            del made
        return after, following

    def convolved(
        self, layer: Layer, convolution: Any, normalise: Callable[[Tensor], Tensor] | None = None
    ) -> Layer:
        """Run a 3 x 3 convolution that keeps the size, after a normalisation if there is one."""
        after = self.new_layer(convolution.out_channels, layer)
        for box in self.boxes(layer):
            ring = box.grown(layer.height, layer.width)
            tile = layer.read(ring, self.device)
            made = convolution(tile if normalise is None else normalise(tile))
            after.write(box, box.of(made, ring.top, ring.left))
        return after

    def new_layer(self, channels: int, like: Layer) -> Layer:
        """Return room for a layer of another one's size."""
        return self.room(channels, like.height, like.width)

    def room(self, channels: int, height: int, width: int) -> Layer:
        """Return room for a layer."""
        size = (1, channels, height, width)
        return Layer(torch.empty(size, dtype=self.dtype, device=self.keep_on))

    def boxes(self, layer: Layer) -> Iterator[Box]:
        """Yield tiles that cover a layer once."""
        for top in range(0, layer.height, self.tile):
            for left in range(0, layer.width, self.tile):
                bottom = min(top + self.tile, layer.height)
                yield Box(top, left, bottom, min(left + self.tile, layer.width))


def middle(block: Any, hidden: Tensor) -> Tensor:
    """Run diffusers' `UNetMidBlock2D` with its scores' memory bounded."""
    hidden = block.resnets[0](hidden, None)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            hidden = _attended(attention, hidden)
        hidden = resnet(hidden, None)
    return hidden


def _attended(attention: Any, hidden: Tensor) -> Tensor:
    """Run diffusers' `Attention` of a VAE, [1, C, h, w], over all latents."""
    _, channels, height, width = hidden.shape
    tokens = height * width
    flat = attention.group_norm(hidden.flatten(2)).transpose(1, 2)
    query, key, value = (
        project(flat).view(1, tokens, attention.heads, -1).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    attended = _attend(query, key, value).transpose(1, 2).reshape(1, tokens, channels)
    attended = attention.to_out[0](attended).transpose(1, 2).reshape(hidden.shape)
    result: Tensor = (attended + hidden) / attention.rescale_output_factor
    return result


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend without all scores in memory at a time; [1, heads, tokens, C] each."""
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return F.scaled_dot_product_attention(query, key, value)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # no such kernel for heads so wide
        # Scores in float32, and the same again as a softmax.
        rows = max(1, ATTENTION_PART_BYTES // (8 * query.shape[1] * query.shape[2]))
        parts = torch.split(query, rows, dim=2)
        return torch.cat(
            [F.scaled_dot_product_attention(part, key, value) for part in parts], dim=2
        )
