"""A transformer of SD3.5's real size on disk: a directory, or one file under the original names."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from deployments.sd3.fp8 import LARGEST_E4M3, quantize_per_channel
from loadtest.checkpoint_formats import TRANSFORMER, is_block_linear, original_transformer
from loadtest.sd35 import empty_transformer, position_table, random_values

_SHARD_BYTES = 2 * 2**30
_STEM = "diffusion_pytorch_model"
_NOTE = b'{"format": "float8_e4m3fn"}'


@torch.no_grad()
def write_random_checkpoint(
    model_dir: Path, name: str, device: torch.device, seed: int = 0, *, fp8: bool = True
) -> None:
    """Write `MODEL/transformer` with random weights, block Linears as FP8 with float32 scales.

    A folder that is there was finished, and is left as it is.

    Args:
        model_dir: In Diffusers layout.
        name: As `loadtest.sd35.config` takes it.
        device: Where weights are drawn.
        seed: Of the weights.
        fp8: Or all of it in bfloat16.
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
    quantised = _block_linears(model) if fp8 else set()
    for full_name, parameter in model.named_parameters():
        values = random_values(full_name, parameter.shape, generator)
        if full_name in quantised:
            values, scale = quantize_per_channel(values)
            shards.add(full_name + "_scale", scale)
        shards.add(full_name, values)
    shards.add("pos_embed.pos_embed", position_table(model, device))
    shards.finish()
    os.replace(part, folder)


@torch.no_grad()
def write_random_file(
    path: Path, name: str, form: Literal["bf16", "fp8"], device: torch.device, seed: int = 0
) -> None:
    """Write a checkpoint of a transformer under the original names, tensor by tensor.

    A file that is there was finished, and is left as it is.

    Args:
        path: Of the file.
        name: As `loadtest.sd35.config` takes it.
        form: `fp8`: block matrices in E4M3 with one scale each and a `comfy_quant` note.
        device: Where weights are drawn.
        seed: Of the weights.
    """
    if path.exists():
        return
    model = empty_transformer(name)
    shapes = {n: tuple(t.shape) for n, t in original_transformer(model.state_dict()).items()}
    tensors = list(_entries(shapes, form))
    header: dict[str, object] = {}
    at = 0
    for full_name, dtype, shape, size in tensors:
        header[full_name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    generator = torch.Generator(device).manual_seed(seed)
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        scale = torch.ones(())
        for full_name, dtype, _, _ in tensors:
            bare = full_name.removeprefix(TRANSFORMER)
            if bare.endswith(".comfy_quant"):
                stream.write(_NOTE)
                continue
            if bare.endswith(".weight_scale"):
                stream.write(struct.pack("<f", float(scale)))
                continue
            if bare == "pos_embed":
                values = position_table(model, device)
            else:
                values = random_values(bare, shapes[bare], generator)
            if dtype == "F8_E4M3":
                scale = values.float().abs().max() / LARGEST_E4M3
                values = (values.float() / scale).to(torch.float8_e4m3fn)
            stream.write(values.cpu().contiguous().view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())  # a page that is not written yet cannot leave the page cache
    os.replace(part, path)


def _entries(
    shapes: dict[str, tuple[int, ...]], form: str
) -> Iterator[tuple[str, str, list[int], int]]:
    """Yield name, dtype, shape and bytes of what a file holds; a scale right after its weight."""
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        full_name = TRANSFORMER + name
        if form == "fp8" and is_block_linear(name) and len(shape) == 2:
            module = full_name.removesuffix(".weight")
            yield full_name, "F8_E4M3", list(shape), count
            yield module + ".weight_scale", "F32", [], 4
            yield module + ".comfy_quant", "U8", [len(_NOTE)], len(_NOTE)
        else:
            yield full_name, "BF16", list(shape), 2 * count


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
