"""Training state on disk: averaged weights in small shards, and all that a resumed run needs.

Everything is safetensors, written beside and then renamed, so that a kill leaves the last one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deployments.builtin.architecture import Parts
from deployments.builtin.optimizer import Optimizer, WeightAverage

# of tensors, so that a file with its header stays under 15 MiB
MAX_SHARD_BYTES = 15 * 1024 * 1024 - 128 * 1024


def shards(
    tensors: dict[str, torch.Tensor], limit: int = MAX_SHARD_BYTES
) -> list[dict[str, torch.Tensor]]:
    """Split tensors, in their order, into groups of at most ``limit`` bytes.

    Raises:
        ValueError: one tensor alone is larger.
    """
    groups: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > limit:
            raise ValueError(f"{name} takes {size} bytes, more than a shard's {limit}")
        if used + size > limit:
            groups.append({})
            used = 0
        groups[-1][name] = tensor
        used += size
    return groups


def pieces(
    tensors: dict[str, torch.Tensor], limit: int = MAX_SHARD_BYTES
) -> dict[str, torch.Tensor]:
    """Cut each tensor larger than ``limit`` bytes along its first dimension.

    The optimizer stacks all matrices of one shape, and such a stack outgrows a shard. Pieces of
    ``name`` are called ``name:0``, ``name:1`` and so on; ``joined`` is the inverse.
    """
    cut: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() <= limit:
            cut[name] = tensor
            continue
        rows = max(1, limit // (tensor[0].numel() * tensor.element_size()))
        cut |= {f"{name}:{index}": piece for index, piece in enumerate(torch.split(tensor, rows))}
    return cut


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inverse of ``pieces``."""
    whole: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        stem, colon, index = name.rpartition(":")
        if colon:
            parts.setdefault(stem, {})[int(index)] = tensor
        else:
            whole[name] = tensor
    return whole | {
        stem: torch.cat([numbered[index] for index in sorted(numbered)])
        for stem, numbered in parts.items()
    }


def save_average(directory: Path, parts: Parts, average: WeightAverage) -> None:
    """Write ``ema-00001-of-0000N.safetensors``: averaged weights as float16."""
    names = [name for name, _ in parts.named_parameters()]
    tensors = {
        name: tensor.to("cpu", torch.float16)
        for name, tensor in zip(names, average.average, strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    groups = shards(tensors)
    for index, group in enumerate(groups):
        path = directory / f"ema-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        _save(group, path, {"format": "pt"})


def load_average(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of ``save_average`` by parameter name, float32 on the CPU.

    Raises:
        FileNotFoundError: no such shards in the directory.
    """
    paths = sorted(directory.glob("ema-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no ema-*.safetensors in {directory}")
    return {name: tensor.float() for path in paths for name, tensor in load_file(path).items()}


def save_resume(
    directory: Path,
    parts: Parts,
    average: WeightAverage,
    optimizer: Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write raw weights, averages, optimizer and ``progress`` to shards in a directory.

    The directory is replaced only once all shards are written.
    """
    tensors: dict[str, torch.Tensor] = {
        f"raw.{name}": tensor for name, tensor in parts.named_parameters()
    }
    for (name, _), tensor in zip(parts.named_parameters(), average.average, strict=True):
        tensors[f"ema.{name}"] = tensor
    tensors |= {f"opt.{name}": tensor for name, tensor in optimizer.state_tensors().items()}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    groups = shards(pieces(on_cpu, MAX_SHARD_BYTES), MAX_SHARD_BYTES)
    metadata = {"format": "pt", "progress": json.dumps(progress)}
    for index, group in enumerate(groups):
        name = f"flow-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, partial / name, metadata=metadata)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


@torch.no_grad()
def load_resume(
    directory: Path, parts: Parts, average: WeightAverage, optimizer: Optimizer
) -> dict[str, Any]:
    """Inverse of ``save_resume``; returns ``progress``.

    Raises:
        FileNotFoundError: no such shards in the directory.
        KeyError: they are of a model of another shape.
    """
    paths = sorted(directory.glob("flow-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no flow-*.safetensors in {directory}")
    with safe_open(paths[0], framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
    tensors = joined({name: tensor for path in paths for name, tensor in load_file(path).items()})
    for (name, parameter), mean in zip(parts.named_parameters(), average.average, strict=True):
        parameter.copy_(tensors[f"raw.{name}"])
        mean.copy_(tensors[f"ema.{name}"])
    prefix = "opt."
    optimizer.load_state_tensors(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    return dict(progress)


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)
