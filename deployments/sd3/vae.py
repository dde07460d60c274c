"""Latents to pixels and pixels to latents, within a memory known before it starts.

A VAE overflows float16 (SD3.5's configuration says `force_upcast`), so it is computed in bfloat16
or float32 whatever its files hold.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from torch import Tensor

from deployments.sd3.card import usable_bytes
from deployments.sd3.checkpoint import load_component, resident_bytes
from deployments.sd3.compiled_decode import CompiledDecode, Prepared
from deployments.sd3.decode_plan import (
    DecodePlan,
    DecoderShape,
    TilingSettings,
    frugal_plan,
    plan_decode,
    plan_encode,
)
from deployments.sd3.host_memory import keep_freed_memory
from deployments.sd3.precision import PrecisionChoice, as_choice
from deployments.sd3.stored_tensors import read_json
from deployments.sd3.tiled_decode import decode_in_tiles
from deployments.sd3.tiled_encode import encode_in_tiles
from serve.errors import StageFailed

_log = logging.getLogger(__name__)


class VaeDecoder:
    """Wraps diffusers' `AutoencoderKL`: its decoder, and its encoder for image-to-image.

    Args:
        model: Loaded, in eval mode.
        device: Where it is.
        precision: What it was loaded in.
        tiling: When to decode in tiles, and how much memory to take.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        device: torch.device,
        precision: PrecisionChoice,
        tiling: TilingSettings | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self.tiling = tiling or TilingSettings()
        self.shape = DecoderShape(
            tuple(model.config.block_out_channels), precision.compute_dtype.itemsize
        )
        self.compiled: CompiledDecode | None = None
        self.channels = int(model.config.latent_channels)
        self.scaling_factor = float(model.config.scaling_factor)
        self.shift_factor = float(model.config.shift_factor or 0.0)

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        device: torch.device | str,
        precision: PrecisionChoice | str,
        tiling: TilingSettings | None = None,
    ) -> VaeDecoder:
        """Load `MODEL/vae`. A VAE is convolutions and has no FP8 weights.

        Args:
            model_dir: In Diffusers layout.
            device: Where to put it.
            precision: A choice, or what `choose_precision` takes.
            tiling: When to decode in tiles, and how much memory to take.

        Raises:
            ConfigurationError: The files do not fit the configuration, or the precision the device.
        """
        folder = Path(model_dir) / "vae"
        config = read_json(folder / "config.json")
        device = torch.device(device)
        precision = as_choice(precision, device)
        precision = precision.without_fp8("a VAE has no FP8 weights; " + precision.reason)

        def build() -> AutoencoderKL:
            with torch.device("meta"):
                return AutoencoderKL.from_config(config)

        model = load_component(folder, build, device, precision)
        if device.type == "cpu":
            keep_freed_memory()
            # 1.3 to 1.6 times as fast there; on an H100 it is slower.
            model.to(memory_format=torch.channels_last)
        return cls(model, device, precision, tiling)

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights."""
        return resident_bytes(self.model)

    def prepare(self, height: int, width: int) -> Prepared | None:
        """Compile decoding for latents of these sides; on a GPU alone, and where they stay whole.

        On a CPU it would need a C++ compiler at the place where it runs, and pictures there are
        small.

        Returns:
            What became of it, or None where it is not tried.
        """
        if self.device.type != "cuda" or self.plan(height, width).tile is not None:
            return None
        if self.compiled is None:
            self.compiled = CompiledDecode(self.model.decoder)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, self.channels, height, width, generator=generator)
        return self.compiled.prepare(latents.to(self.device, self.precision.compute_dtype))

    @property
    def prepared(self) -> Mapping[tuple[int, ...], Prepared]:
        """Shape of latents, [1, C, h, w] -> what became of preparing it."""
        return {} if self.compiled is None else self.compiled.prepared

    def plan(self, height: int, width: int) -> DecodePlan:
        """Return how latents of these sides would be decoded now.

        Raises:
            StageFailed: They do not fit the memory.
        """
        return plan_decode(self.shape, height, width, self._memory_bytes(), self.tiling.mode)

    def _memory_bytes(self) -> int:
        """Return what decoding may take beside the weights."""
        allowed = self.tiling.memory_bytes - self.resident_bytes
        if self.device.type != "cuda":
            return allowed
        return min(allowed, usable_bytes(self.device))

    @torch.inference_mode()
    def decode(self, latents: NDArray[np.float32] | Tensor) -> NDArray[np.uint8]:
        """Decode one picture.

        Args:
            latents: float32 [C, h, w], as the denoiser leaves them.

        Returns:
            uint8 [8 h, 8 w, 3], RGB.

        Raises:
            StageFailed: The latents are not finite, have the wrong shape or do not fit the memory.
        """
        # Copied: arrays that came through an object store are read-only, which torch warns about.
        tensor = latents if isinstance(latents, Tensor) else torch.from_numpy(np.array(latents))
        if tensor.dim() != 3 or tensor.shape[0] != self.channels:
            raise StageFailed(
                "The latents have the wrong shape.",
                field="latents",
                value=str(list(tensor.shape)),
                allowed=f"[{self.channels}, height / 8, width / 8]",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise StageFailed("The latents hold NaN or infinite values.", field="latents")
        scaled = tensor.float()[None] / self.scaling_factor + self.shift_factor
        scaled = scaled.to(self.device, self.precision.compute_dtype)
        image = self._image(scaled)[0].float()
        if not bool(torch.isfinite(image).all()):
            raise StageFailed("The VAE produced NaN or infinite pixels.", field="latents")
        pixels = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())

    @torch.inference_mode()
    def encode(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Encode one picture.

        Args:
            pixels: uint8 [height, width, 3], RGB; sides are multiples of 8.

        Returns:
            Mean and standard deviation of its latents, as the model samples them: float32
            [C, height / 8, width / 8] each.

        Raises:
            StageFailed: It has the wrong shape or does not fit the memory.
        """
        side = 2 ** (len(self.model.config.block_out_channels) - 1)
        is_image = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        if not is_image or not pixels.size or pixels.shape[0] % side or pixels.shape[1] % side:
            raise StageFailed(
                "The start image has the wrong shape.",
                field="init_image",
                value=f"{pixels.dtype} {list(pixels.shape)}",
                allowed=f"uint8 [height, width, 3], sides multiples of {side}",
            )
        # Copied: arrays that came through an object store are read-only, which torch warns about.
        image = torch.from_numpy(np.array(pixels)).to(self.device).permute(2, 0, 1)[None]
        image = (image.float() / 255 * 2 - 1).to(self.precision.compute_dtype)
        latents = DiagonalGaussianDistribution(self._moments(image))
        mean = (latents.mean.float() - self.shift_factor) * self.scaling_factor
        std = latents.std.float() * self.scaling_factor
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise StageFailed("The VAE produced NaN or infinite latents.", field="init_image")
        return mean[0].cpu().numpy(), std[0].cpu().numpy()

    def _moments(self, image: Tensor) -> Tensor:
        """Return [1, 2 C, h, w] of [1, 3, 8 h, 8 w], as planned."""
        height, width = (
            side // 2 ** (len(self.shape.block_out_channels) - 1) for side in image.shape[2:]
        )
        plan = plan_encode(self.shape, height, width, self._memory_bytes(), self.tiling.mode)
        encoder = self.model.encoder
        moments = encoder(image) if plan.tile is None else encode_in_tiles(encoder, image, plan)
        quant: Tensor = moments if self.model.quant_conv is None else self.model.quant_conv(moments)
        return quant

    def _image(self, scaled: Tensor) -> Tensor:
        """Return [1, 3, 8 h, 8 w] from -1 to 1, as planned, or in tiles where that ran out."""
        height, width = scaled.shape[2:]
        plan = self.plan(height, width)
        try:
            return self._carried_out(plan, scaled)
        except torch.OutOfMemoryError:
            if self.tiling.mode == "off" or plan.on_host:
                raise
            _log.warning("decoding %dx%d latents ran out of memory", height, width)
        # What was told to be free has gone to a neighbour, or is in pieces.
        torch.cuda.empty_cache()
        return self._carried_out(frugal_plan(self.shape, height, width), scaled)

    def _carried_out(self, plan: DecodePlan, scaled: Tensor) -> Tensor:
        if plan.tile is not None:
            return decode_in_tiles(self.model.decoder, scaled, plan)
        if self.compiled is not None and self.compiled.has(scaled):
            return self.compiled(scaled)
        image: Tensor = self.model.decode(scaled, return_dict=False)[0]
        return image
