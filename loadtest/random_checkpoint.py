"""A transformer of SD3.5's real size on disk, in the format that Kelvin's FP8 models have."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from deployments.sd3.fp8 import quantize_per_channel
from loadtest.sd35 import empty_transformer, position_table, random_values

_SHARD_BYTES = 2 * 2**30
_STEM = "diffusion_pytorch_model"


@torch.no_grad()
def write_random_checkpoint(
    model_dir: Path, name: str, device: torch.device, seed: int = 0
) -> None:
    """Write `MODEL/transformer` with random weights, block Linears as FP8 with float32 scales.

    A folder that is there was finished, and is left as it is.

    Args:
        model_dir: In Diffusers layout.
        name: As `loadtest.sd35.config` takes it.
        device: Where weights are drawn.
        seed: Of the weights.
    """
    folder = model_dir / "transformer"
    if folder.exists():
        return
    part = model_dir / "transformer.part"
    part.mkdir(parents=True, exist_ok=True)
    model = empty_transformer(name)
    model.save_config(part)
    shards = _Shards(part)
    generator = torch.Generator(device).manual_seed(seed)
    quantised = _block_linears(model)
    for full_name, parameter in model.named_parameters():
        values = random_values(full_name, parameter.shape, generator)
        if full_name in quantised:
            values, scale = quantize_per_channel(values)
            shards.add(full_name + "_scale", scale)
        shards.add(full_name, values)
    shards.add("pos_embed.pos_embed", position_table(model, device))
    shards.finish()
    os.replace(part, folder)


def _block_linears(model: SD3Transformer2DModel) -> set[str]:
    return {
        f"transformer_blocks.{name}.weight"
        for name, module in model.transformer_blocks.named_modules()
        if isinstance(module, nn.Linear)
    }


class _Shards:
    """Tensors into files of two GiB, so that the host never holds more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._weight_map: dict[str, str] = {}
        self._files = 0
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor.cpu().contiguous()
        self._total += tensor.nbytes
        if sum(each.nbytes for each in self._tensors.values()) >= _SHARD_BYTES:
            self._write()

    def finish(self) -> None:
        self._write()
        index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
        path = self.folder / f"{_STEM}.safetensors.index.json"
        path.write_text(json.dumps(index), encoding="utf-8")

    def _write(self) -> None:
        if not self._tensors:
            return
        self._files += 1
        file = f"{_STEM}-{self._files:05d}.safetensors"
        save_file(self._tensors, self.folder / file)
        self._weight_map |= dict.fromkeys(self._tensors, file)
        self._tensors = {}
