"""Decode a large picture tile by tile, to the same pixels as whole.

Usual tiled decoding runs the whole decoder on overlapping tiles and blends their seams, which hides
that each tile was normalised, and attended, by itself. Here every layer goes over all tiles before
the next begins: group statistics are those of the whole picture, attention at the latents' size is
not tiled at all, and a tile reads its neighbours' true values around it. So there are no seams to
blend, and nothing is computed twice but the convolution after each enlargement. The price is that a
layer's activations are kept, once, on the device or in the host's memory.

Layers are those of diffusers' `Decoder` (`models/autoencoders/vae.py`) and its `UpDecoderBlock2D`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deployments.sd3.channel_statistics import ChannelStatistics
from deployments.sd3.decode_plan import ATTENTION_PART_BYTES, DecodePlan


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


class _Layer:
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
        if self.enlarge is None:
            return box.of(self.values).to(device)
        ring = box.grown(self.height, self.width)
        source = Box(ring.top // 2, ring.left // 2, -(-ring.bottom // 2), -(-ring.right // 2))
        enlarged = self.enlarge(source.of(self.values).to(device))
        return box.of(enlarged, 2 * source.top, 2 * source.left)

    def write(self, box: Box, tile: Tensor) -> None:
        box.of(self.values).copy_(tile)


def decode_in_tiles(decoder: Any, latents: Tensor, plan: DecodePlan) -> Tensor:
    """Decode one picture.

    Args:
        decoder: diffusers' `Decoder`, in eval mode.
        latents: [1, C, h, w], scaled as the VAE wants them, on the decoder's device and of its
            dtype.
        plan: With a tile.

    Returns:
        The image, [1, 3, 8 h, 8 w], from -1 to 1, where the plan keeps activations.

    Raises:
        ValueError: The plan is to decode whole.
    """
    if plan.tile is None:
        raise ValueError("a plan without tiles was given to the tiled decoder")
    return _TiledDecode(decoder, latents, plan.tile, plan.on_host).image()


class _TiledDecode:
    def __init__(self, decoder: Any, latents: Tensor, tile: int, on_host: bool) -> None:
        self.decoder = decoder
        self.latents = latents
        self.tile = tile
        self.device = latents.device
        self.keep_on = torch.device("cpu") if on_host else self.device

    def image(self) -> Tensor:
        middle = _middle(self.decoder.mid_block, self.decoder.conv_in(self.latents))
        layer = _Layer(middle.to(self.keep_on))
        del middle
        statistics = self._measured(layer)
        for block in self.decoder.up_blocks:
            for resnet in block.resnets:
                layer, statistics = self._resnet(resnet, layer, statistics)
            if block.upsamplers is not None:
                (enlarge,) = block.upsamplers
                layer = _Layer(layer.values, enlarge)
                statistics = self._measured(layer)
        return self._finish(layer, statistics)

    def _measured(self, layer: _Layer) -> ChannelStatistics:
        statistics = ChannelStatistics()
        for box in self._boxes(layer):
            statistics.add(layer.read(box, self.device))
        return statistics

    def _resnet(
        self, block: Any, layer: _Layer, statistics: ChannelStatistics
    ) -> tuple[_Layer, ChannelStatistics]:
        hidden = self._new_layer(block.out_channels, layer)
        in_place = block.conv_shortcut is None and layer.enlarge is None
        after = layer if in_place else self._new_layer(block.out_channels, layer)
        normalise = statistics.normaliser(block.norm1)
        between = ChannelStatistics()
        for box in self._boxes(layer):
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
        for box in self._boxes(layer):
            ring = box.grown(layer.height, layer.width)
            made = block.conv2(normalise(hidden.read(ring, self.device)))
            made = after.read(box, self.device) + box.of(made, ring.top, ring.left)
            following.add(made)
            after.write(box, made)
            del made
        return after, following

    def _finish(self, layer: _Layer, statistics: ChannelStatistics) -> Tensor:
        decoder = self.decoder
        normalise = statistics.normaliser(decoder.conv_norm_out)
        image = self._new_layer(decoder.conv_out.out_channels, layer)
        for box in self._boxes(layer):
            ring = box.grown(layer.height, layer.width)
            made = decoder.conv_out(normalise(layer.read(ring, self.device)))
            image.write(box, box.of(made, ring.top, ring.left))
        return image.values

    def _new_layer(self, channels: int, like: _Layer) -> _Layer:
        size = (1, channels, like.height, like.width)
        return _Layer(torch.empty(size, dtype=self.latents.dtype, device=self.keep_on))

    def _boxes(self, layer: _Layer) -> Iterator[Box]:
        for top in range(0, layer.height, self.tile):
            for left in range(0, layer.width, self.tile):
                bottom = min(top + self.tile, layer.height)
                yield Box(top, left, bottom, min(left + self.tile, layer.width))


def _middle(block: Any, hidden: Tensor) -> Tensor:
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
