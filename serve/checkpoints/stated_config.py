"""What a Diffusers directory states of itself, checked before anything is built by it.

Its `config.json`s and its index come with the weights, so they are as little to be trusted: a count
of layers decides how much is built, and a text where a number belongs would fail far from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serve.checkpoints.architecture import MOST_LAYERS, MOST_SIDE
from serve.checkpoints.key_names import Kind
from serve.checkpoints.tensor_files import read_json
from serve.errors import ConfigurationError

_MOST = 1 << 20  # of widths and words; SD3.5's largest is CLIP's 49408 words
_MOST_LEVELS = 10  # of a VAE: each halves the sides
_CLIP = {
    "hidden_size": _MOST,
    "intermediate_size": _MOST,
    "max_position_embeddings": _MOST,
    "num_attention_heads": _MOST,
    "num_hidden_layers": MOST_LAYERS,
    "projection_dim": _MOST,
    "vocab_size": _MOST,
}
_COUNTS: Mapping[Kind, Mapping[str, int]] = {
    "transformer": {
        "attention_head_dim": _MOST,
        "caption_projection_dim": _MOST,
        "in_channels": _MOST,
        "joint_attention_dim": _MOST,
        "num_attention_heads": _MOST,
        "num_layers": MOST_LAYERS,
        "out_channels": _MOST,
        "patch_size": _MOST,
        "pooled_projection_dim": _MOST,
        "pos_embed_max_size": MOST_SIDE,
        "sample_size": _MOST,
    },
    "clip_l": _CLIP,
    "clip_g": _CLIP,
    "t5": {
        "d_ff": _MOST,
        "d_kv": _MOST,
        "d_model": _MOST,
        "num_heads": _MOST,
        "num_layers": MOST_LAYERS,
        "relative_attention_num_buckets": _MOST,
        "vocab_size": _MOST,
    },
    "vae": {
        "latent_channels": _MOST,
        "layers_per_block": MOST_LAYERS,
        "norm_num_groups": _MOST,
    },
}
"""The largest value of each field by which something is built."""

_LISTS: Mapping[Kind, Mapping[str, tuple[int, int, int]]] = {
    "transformer": {"dual_attention_layers": (0, MOST_LAYERS, MOST_LAYERS)},
    "vae": {"block_out_channels": (1, _MOST, _MOST_LEVELS)},
}
"""Of each list of numbers: the least and the largest of them, and how many there may be."""

_FACTORS: Mapping[Kind, tuple[str, ...]] = {"vae": ("scaling_factor", "shift_factor")}


def read_config(folder: Path, kind: Kind) -> dict[str, Any]:
    """Read a part's `config.json`; what it leaves out is left to the class that is built by it.

    Args:
        folder: Of the part.
        kind: Which part.

    Raises:
        ConfigurationError: It cannot be read, a number in it is none or beyond any model's, or it
            names a quantisation that Kelvin does not read.
    """
    path = folder / "config.json"
    config = read_json(path)
    _refuse_other_quantisation(folder, config)
    for name, most in _COUNTS[kind].items():
        if name in config and not _is_whole(config[name], 1, most):
            raise _unusable(path, name, config[name], f"a whole number from 1 to {most:,}")
    for name, (least, most, count) in _LISTS.get(kind, {}).items():
        stated = config.get(name, [least])
        fits = isinstance(stated, list) and least <= len(stated) <= count
        if not fits or not all(_is_whole(each, least, most) for each in stated):
            allowed = f"at most {count} whole numbers from {least} to {most:,}"
            raise _unusable(path, name, stated, allowed)
    for name in _FACTORS.get(kind, ()):
        if name in config and not _is_factor(config[name], name):
            raise _unusable(path, name, config[name], "a finite number, a scale above 0")
    return config


def class_in(index_path: Path, name: str) -> str | None:
    """Return the class that `model_index.json` names for a component; None where it has none.

    Raises:
        ConfigurationError: The index cannot be read, or says something else than library and class.
    """
    stated = read_json(index_path).get(name)
    if stated in (None, [None, None]):
        return None
    if isinstance(stated, list) and len(stated) == 2 and all(isinstance(s, str) for s in stated):
        return str(stated[1])
    raise _unusable(index_path, name, stated, "library and class, or two nulls for none")


def _refuse_other_quantisation(folder: Path, config: Mapping[str, Any]) -> None:
    stated = config.get("quantization_config")
    method = None if stated is None else "unnamed"
    if isinstance(stated, dict):
        method = str(stated.get("quant_method", method))
    if (folder / "hf_quant_config.json").exists():
        method = "modelopt"
    if method is not None:
        raise ConfigurationError(
            f"{folder} holds weights quantised by {method[:60]}.",
            field="model.path",
            value=str(folder),
            allowed="bf16, fp16, fp32, or FP8 with weight_scale tensors and no quantization_config",
        )


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_factor(value: Any, name: str) -> bool:
    if type(value) not in (int, float) or not abs(value) < _MOST:
        return False
    return value > 0 or name != "scaling_factor"


def _unusable(path: Path, name: str, stated: Any, allowed: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} states {name} as {str(stated)[:60]!r}.",
        field="model.path",
        value=name,
        allowed=allowed,
    )
