"""Turns an FP8 model directory into a plain one that diffusers loads by itself.

``StableDiffusion3Pipeline.from_pretrained`` knows nothing of ``weight_scale``; this multiplies
the scales in. It serves parity tests, and users who want the weights elsewhere.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

_SCALE = "_scale"
_PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of one part, as stored.

    Raises:
        FileNotFoundError: the folder holds no safetensors file.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no *.safetensors in {folder}")
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def dequantised(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors with every FP8 weight multiplied by its scale, floating ones as ``dtype``."""
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(f".weight{_SCALE}"):
            continue
        scale = state.get(name + _SCALE)
        if tensor.dtype == torch.float8_e4m3fn:
            value = tensor.float()
            plain[name] = (value if scale is None else value * scale[:, None]).to(dtype)
        else:
            plain[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return plain


def load_dequantised(parts: nn.Module, vae: AutoencoderKL, model_dir: Path) -> None:
    """Fill modules with a model directory's weights, and the autoencoder's config with its factors.

    Args:
        parts: with the transformer and the text encoders as children, named like the folders.
        vae: the autoencoder.
        model_dir: as ``write_model`` leaves it.

    Raises:
        FileNotFoundError: ``model_dir`` lacks a part.
    """
    for name, module in (*parts.named_children(), ("vae", vae)):
        # Not strict: what is shared is stored once, under one of its names.
        module.load_state_dict(
            dequantised(read_weights(model_dir / name), torch.float32), strict=False
        )
    config = json.loads((model_dir / "vae" / "config.json").read_text(encoding="utf-8"))
    vae.register_to_config(
        scaling_factor=config["scaling_factor"], shift_factor=config["shift_factor"]
    )


def dequantized_directory(model_dir: Path, out_dir: Path, dtype: torch.dtype) -> Path:
    """Write a plain Diffusers directory of a model directory.

    Args:
        model_dir: as ``write_model`` leaves it.
        out_dir: created; whatever lies there is replaced.
        dtype: of every weight written.

    Returns:
        ``out_dir``, which ``StableDiffusion3Pipeline.from_pretrained`` loads.

    Raises:
        FileNotFoundError: ``model_dir`` lacks a part.
    """
    shutil.rmtree(out_dir, ignore_errors=True)
    shutil.copytree(
        model_dir, out_dir, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json")
    )
    for part in _PARTS:
        state = dequantised(read_weights(model_dir / part), dtype)
        stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
        save_file(state, out_dir / part / f"{stem}.safetensors", metadata={"format": "pt"})
    return out_dir
