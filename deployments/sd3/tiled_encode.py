"""Encode a large picture tile by tile, to the latents that whole encoding gives.

See `deployments.sd3.tiled_layers`; an encoder's layers shrink on the way, so the first are all that
takes memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deployments.sd3.decode_plan import DecodePlan
from deployments.sd3.tiled_layers import Box, Layer, TiledLayers, middle


def encode_in_tiles(encoder: Any, image: Tensor, plan: DecodePlan) -> Tensor:
    """Encode one picture.

    Args:
        encoder: diffusers' `Encoder`, in eval mode.
        image: [1, 3, 8 h, 8 w], from -1 to 1, on the encoder's device and of its dtype.
        plan: With a tile.

    Returns:
        The moments, [1, 2 C, h, w], on that device.

    Raises:
        ValueError: The plan is to encode whole.
    """
    if plan.tile is None:
        raise ValueError("a plan without tiles was given to the tiled encoder")
    layers = TiledLayers(plan.tile, image.device, image.dtype, plan.on_host)
    layer = layers.convolved(Layer(image.to(layers.keep_on)), encoder.conv_in)
    for block in encoder.down_blocks:
        statistics = layers.measured(layer)
        for resnet in block.resnets:
            layer, statistics = layers.resnet(resnet, layer, statistics)
        if block.downsamplers is not None:
            (reduce,) = block.downsamplers
            layer = _reduced(layers, layer, reduce.conv)
    hidden = middle(encoder.mid_block, layer.values.to(image.device))
    moments: Tensor = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(hidden)))
    return moments


def _reduced(layers: TiledLayers, layer: Layer, convolution: Any) -> Layer:
    """Run diffusers' `Downsample2D` of an encoder: a row and a column of zeros, then stride 2."""
    height, width = layer.height // 2, layer.width // 2
    after = layers.room(convolution.out_channels, height, width)
    for box in layers.boxes(after):
        bottom, right = 2 * box.bottom + 1, 2 * box.right + 1
        beyond = (0, max(right - layer.width, 0), 0, max(bottom - layer.height, 0))
        source = Box(2 * box.top, 2 * box.left, min(bottom, layer.height), min(right, layer.width))
        after.write(box, convolution(F.pad(layer.read(source, layers.device), beyond)))
    return after
