"""Writes a trained model as a Diffusers directory with FP8 weights.

Linear weights of the transformer's blocks, of its last modulation and of T5 are float8 E4M3 with
one float32 scale for each output channel (``X.weight`` [out, in], ``X.weight_scale`` [out]);
everything else is float16. Shards stay under 15 MiB, beside the index that diffusers and
transformers write. The small file ``kelvin.json`` says what a server cannot guess: default and
largest sizes, steps, guidance and prompt lengths.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from deployments.builtin.architecture import ModelSpec, Parts, build_scheduler
from deployments.builtin.checkpoint import MAX_SHARD_BYTES, shards
from deployments.builtin.conditioning import PromptEncoder
from deployments.sd3.fp8 import quantize_per_channel

STORAGE_DTYPE = torch.float16
_FP8_PREFIXES = {
    "transformer": ("transformer_blocks.", "norm_out."),
    "text_encoder_3": ("encoder.block.",),
}


def fp8_weight_names(module: nn.Module, prefixes: tuple[str, ...]) -> set[str]:
    """Names of the Linear weights under any of ``prefixes``."""
    return {
        f"{name}.weight"
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and name.startswith(prefixes)
    }


def quantised_state(module: nn.Module, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """State of a module for storage: Linear weights under ``prefixes`` in FP8, others float16.

    Shared tensors appear once, under their first name.
    """
    chosen = fp8_weight_names(module, prefixes)
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        value = tensor.detach().to("cpu")
        if name in chosen:
            weight, scale = quantize_per_channel(value.float())
            state[name] = weight.contiguous()
            state[f"{name}_scale"] = scale.contiguous()
        else:
            state[name] = value.to(STORAGE_DTYPE).contiguous()
    return state


def write_weights(directory: Path, stem: str, state: dict[str, torch.Tensor]) -> None:
    """Write one part's tensors: one file, or shards and their index."""
    groups = shards(state, MAX_SHARD_BYTES)
    metadata = {"format": "pt"}  # a second key would make the bytes depend on its place
    if len(groups) == 1:
        save_file(groups[0], directory / f"{stem}.safetensors", metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups):
        name = f"{stem}-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, directory / name, metadata=metadata)
        weight_map |= dict.fromkeys(group, name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / f"{stem}.safetensors.index.json", index_file)


def kelvin_defaults(spec: ModelSpec) -> dict[str, Any]:
    """What ``kelvin.json`` holds."""
    return {
        "name": spec.name,
        "license": "Apache-2.0",
        "num_inference_steps": 20 if spec.name == "builtin" else 4,
        "guidance_scale": 4.0,
        "width": spec.default_size,
        "height": spec.default_size,
        "min_size": spec.min_size,
        "max_size": spec.max_size,
        "largest_side": spec.largest_side,
        "trained_sides": None if spec.trained_sides is None else list(spec.trained_sides),
        "size_multiple": 16,
        "max_sequence_length": spec.t5_length,
        "clip_max_length": spec.clip_length,
        "sampler": "euler",
        "scheduler": "normal",
        "shift": 3.0,
        "quantization": {"format": "float8_e4m3fn", "scale": "weight_scale, per output channel"},
    }


def write_model(
    directory: Path, spec: ModelSpec, parts: Parts, vae: AutoencoderKL, encoder: PromptEncoder
) -> None:
    """Write the whole model, replacing what is at ``directory`` only once all is written."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, module in (*parts.named_children(), ("vae", vae)):
        folder = partial / name
        folder.mkdir()
        _write_config(module, folder, name)
        is_diffusers = name in ("transformer", "vae")
        stem = "diffusion_pytorch_model" if is_diffusers else "model"
        write_weights(folder, stem, quantised_state(module, _FP8_PREFIXES.get(name, ())))
    for name, tokenizer in (
        ("tokenizer", encoder.clip),
        ("tokenizer_2", encoder.clip),
        ("tokenizer_3", encoder.t5),
    ):
        tokenizer.save_pretrained(str(partial / name))
        if name != "tokenizer_3":
            # vocab.json and merges.txt too: older readers of CLIP know only these.
            encoder.clip.backend_tokenizer.model.save(str(partial / name))
    build_scheduler().save_pretrained(str(partial / "scheduler"))
    _write_json(partial / "model_index.json", model_index())
    _write_json(partial / "kelvin.json", kelvin_defaults(spec))
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _write_config(module: Any, folder: Path, name: str) -> None:
    if name in ("transformer", "vae"):
        module.save_config(str(folder))
        return
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = "float16"
    config.save_pretrained(str(folder))


def model_index() -> dict[str, Any]:
    """What ``model_index.json`` of Stable Diffusion 3.5 holds."""
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
