"""Decode a large picture in tiles, to the pixels of whole: see `deployments.sd3.tiled_layers`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deployments.sd3.decode_plan import DecodePlan
from deployments.sd3.tiled_layers import Layer, TiledLayers, middle


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
    layers = TiledLayers(plan.tile, latents.device, latents.dtype, plan.on_host)
    hidden = middle(decoder.mid_block, decoder.conv_in(latents))
    layer = Layer(hidden.to(layers.keep_on))
    del hidden
    statistics = layers.measured(layer)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            layer, statistics = layers.resnet(resnet, layer, statistics)
        if block.upsamplers is not None:
            (enlarge,) = block.upsamplers
            layer = Layer(layer.values, enlarge)
            statistics = layers.measured(layer)
    normalise = statistics.normaliser(decoder.conv_norm_out)
    return layers.convolved(layer, decoder.conv_out, normalise).values
