"""SD3's denoising transformer: noisy latents and a prompt in, velocity out.

Rows are independent: whether two rows are one request's guidance pair or two requests is not known
here, and nothing computed for one row touches another.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from deployments.sd3.checkpoint import load_component, resident_bytes
from deployments.sd3.cpu_attention import BmmJointAttention
from deployments.sd3.host_memory import keep_freed_memory
from deployments.sd3.precision import PrecisionChoice, as_choice
from deployments.sd3.sigmas import TRAIN_TIMESTEPS
from deployments.sd3.stored_tensors import read_json


class Mmdit:
    """Wraps diffusers' `SD3Transformer2DModel`.

    Args:
        model: Loaded, in eval mode.
        device: Where it is.
        precision: What it was loaded in.
    """

    def __init__(
        self, model: SD3Transformer2DModel, device: torch.device, precision: PrecisionChoice
    ) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self.in_channels = int(model.config.in_channels)

    @classmethod
    def load(
        cls, model_dir: str | Path, device: torch.device | str, precision: PrecisionChoice | str
    ) -> Mmdit:
        """Load `MODEL/transformer`; with FP8 precision every Linear of the blocks is FP8.

        Args:
            model_dir: In Diffusers layout.
            device: Where to put it.
            precision: A choice, or what `choose_precision` takes.

        Raises:
            ConfigurationError: The files do not fit the configuration, or the precision the device.
        """
        folder = Path(model_dir) / "transformer"
        config = read_json(folder / "config.json")
        device = torch.device(device)
        precision = as_choice(precision, device)

        def build() -> SD3Transformer2DModel:
            with torch.device("meta"):
                return SD3Transformer2DModel.from_config(config)

        model = load_component(folder, build, device, precision, "transformer_blocks.")
        if device.type == "cpu":
            keep_freed_memory()
            if precision.compute_dtype == torch.bfloat16:
                model.set_attn_processor(BmmJointAttention())
        return cls(model, device, precision)

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights."""
        return resident_bytes(self.model)

    @torch.inference_mode()
    def velocity(
        self, latents: Tensor, sigmas: Tensor, prompt_embeds: Tensor, pooled: Tensor
    ) -> Tensor:
        """Predict noise - image.

        Args:
            latents: [B, C, h, w], any float dtype.
            sigmas: [B], noise level of each row, 0 to 1.
            prompt_embeds: [B, T, D].
            pooled: [B, P].

        Returns:
            float32 [B, C, h, w].
        """
        dtype = self.precision.compute_dtype
        output: Tensor = self.model(
            hidden_states=latents.to(self.device, dtype),
            timestep=sigmas.to(self.device, torch.float32) * TRAIN_TIMESTEPS,
            encoder_hidden_states=prompt_embeds.to(self.device, dtype),
            pooled_projections=pooled.to(self.device, dtype),
            return_dict=False,
        )[0]
        return output.float()
