"""A part's configuration, read off its tensors' names and shapes.

What no shape tells (heads of CLIP, its activation, groups of the VAE's norms, its scaling) is
SD3.5's own, unless the file's metadata say otherwise under `kelvin.hints`: a JSON object of parts,
each with some of the fields in `HINTS`. Files of a model of another size bring them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from serve.checkpoints.expected import (
    Shapes,
    clip_shapes,
    t5_shapes,
    transformer_shapes,
    vae_shapes,
)
from serve.checkpoints.key_names import Kind
from serve.checkpoints.part import Part
from serve.checkpoints.tensor_files import TensorFiles
from serve.errors import ConfigurationError

HINTS_KEY = "kelvin.hints"
_CLIP_HINTS = ("num_attention_heads", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id")
HINTS: Mapping[str, tuple[str, ...]] = {
    "transformer": ("sample_size",),
    "clip_l": _CLIP_HINTS,
    "clip_g": _CLIP_HINTS,
    "t5": (),
    "vae": ("norm_num_groups", "scaling_factor", "shift_factor"),
}
"""Fields of each part that metadata may state."""

# The format puts no bound on a count of layers; what is built from it must have one.
MOST_LAYERS = 200
MOST_SIDE = 4096
_MOST_STATED = 1 << 20


def config_of(part: Part) -> dict[str, Any]:
    """Return what diffusers and transformers call `config.json`.

    Raises:
        ConfigurationError: A tensor that tells the architecture is missing or of another rank.
    """
    assert part.kind is not None
    config = _OF_KIND[part.kind](_Shapes(part))
    stated = hints(part.files).get(part.kind, {})
    for name in HINTS[part.kind]:
        if isinstance(stated, dict) and name in stated:
            config[name] = _plain(stated[name], part, name)
    heads = config.get("num_attention_heads", 1)
    if config.get("hidden_size", heads) % heads:
        what = f"states {heads} heads for a width of {config['hidden_size']}"
        raise _unclear(part, what, "num_attention_heads")
    return config


def expected_shapes(kind: Kind, config: Mapping[str, Any]) -> Shapes:
    """Return the tensors that a configuration asks for."""
    if kind == "transformer":
        return transformer_shapes(config)
    if kind == "vae":
        return vae_shapes(config)
    return t5_shapes(config) if kind == "t5" else clip_shapes(config)


def hints(files: TensorFiles) -> dict[str, Any]:
    """Return what the files' metadata say of themselves for Kelvin; {} where nothing usable."""
    text = files.metadata(HINTS_KEY)
    if text is None:
        return {}
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


class _Shapes:
    def __init__(self, part: Part) -> None:
        self.part = part
        self.shapes = {name: source.shape for name, source in part.weights.items()}

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            raise _unclear(self.part, f"lacks tensor {name!r}", name)
        if len(shape) != rank or not all(shape):
            raise _unclear(
                self.part, f"has tensor {name!r} as {list(shape)}; {rank} sides expected", name
            )
        return shape

    def count(self, pattern: str) -> int:
        """Return one more than the largest number that a name holds where a pattern has one."""
        found = (re.match(pattern, name) for name in self.shapes)
        count = max((int(match[1]) for match in found if match), default=-1) + 1
        if not 0 < count <= MOST_LAYERS:
            raise _unclear(self.part, f"has {count} layers", pattern)
        return count


def _transformer(shapes: _Shapes) -> dict[str, Any]:
    width, channels, patch, _ = shapes.of("pos_embed.proj.weight", 4)
    (head,) = shapes.of("transformer_blocks.0.attn.norm_q.weight", 1)
    caption, joint = shapes.of("context_embedder.weight", 2)
    _, pooled = shapes.of("time_text_embed.text_embedder.linear_1.weight", 2)
    out, _ = shapes.of("proj_out.weight", 2)
    positions = shapes.of("pos_embed.pos_embed", 3)[1]
    side = math.isqrt(positions)
    if side * side != positions or side > MOST_SIDE or width % head:
        raise _unclear(shapes.part, f"has {positions} positions and heads of {head}", "pos_embed")
    dual = {
        int(match[1])
        for name in shapes.shapes
        if (match := re.match(r"transformer_blocks\.(\d{1,4})\.attn2\.", name))
    }
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": head,
        "caption_projection_dim": caption,
        "dual_attention_layers": sorted(dual),
        "in_channels": channels,
        "joint_attention_dim": joint,
        "num_attention_heads": width // head,
        "num_layers": shapes.count(r"transformer_blocks\.(\d{1,4})\."),
        "out_channels": out // patch**2,
        "patch_size": patch,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": side,
        "qk_norm": "rms_norm",
        "sample_size": min(128, side),
    }


def _clip(shapes: _Shapes, activation: str) -> dict[str, Any]:
    words, width = shapes.of("text_model.embeddings.token_embedding.weight", 2)
    positions, _ = shapes.of("text_model.embeddings.position_embedding.weight", 2)
    inner, _ = shapes.of("text_model.encoder.layers.0.mlp.fc1.weight", 2)
    projection, _ = shapes.of("text_projection.weight", 2)
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,  # where the pooled output is read
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": positions,
        "num_attention_heads": max(1, width // 64),
        "num_hidden_layers": shapes.count(r"text_model\.encoder\.layers\.(\d{1,4})\."),
        "pad_token_id": 1,
        "projection_dim": projection,
        "vocab_size": words,
    }


def _t5(shapes: _Shapes) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention."
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in shapes.shapes:
        raise _unclear(shapes.part, "is T5 v1.0; SD3.5 reads T5 v1.1 XXL", "wi.weight")
    buckets, heads = shapes.of(attention + "relative_attention_bias.weight", 2)
    inner, width = shapes.of(attention + "q.weight", 2)
    hidden, _ = shapes.of("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)
    embedding = "shared.weight"
    if embedding not in shapes.shapes:
        embedding = "encoder.embed_tokens.weight"
    words, _ = shapes.of(embedding, 2)
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_ff": hidden,
        "d_kv": inner // heads,
        "d_model": width,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "num_heads": heads,
        "num_layers": shapes.count(r"encoder\.block\.(\d{1,4})\."),
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": buckets,
        "tie_word_embeddings": True,
        "use_cache": False,
        "vocab_size": words,
    }


def _vae(shapes: _Shapes) -> dict[str, Any]:
    _, latent, _, _ = shapes.of("decoder.conv_in.weight", 4)
    if latent != 16 or "post_quant_conv.weight" in shapes.shapes:
        raise _unclear(
            shapes.part,
            f"is a VAE of {latent} latent channels; SD3.5's has 16 and no quant convolutions",
            "decoder.conv_in.weight",
        )
    levels = shapes.count(r"decoder\.up_blocks\.(\d{1,2})\.")
    channels = [
        shapes.of(f"decoder.up_blocks.{level}.resnets.0.conv1.weight", 4)[0]
        for level in reversed(range(levels))
    ]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": latent,
        "layers_per_block": shapes.count(r"decoder\.up_blocks\.0\.resnets\.(\d{1,2})\.") - 1,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


_OF_KIND = {
    "transformer": _transformer,
    "clip_l": lambda shapes: _clip(shapes, "quick_gelu"),
    "clip_g": lambda shapes: _clip(shapes, "gelu"),
    "t5": _t5,
    "vae": _vae,
}


def _plain(value: Any, part: Part, name: str) -> Any:
    if name == "hidden_act":
        is_usable = isinstance(value, str)
    elif name == "shift_factor":
        is_usable = _is_number(value, int | float) and 0 <= value < _MOST_STATED
    elif name == "scaling_factor":
        is_usable = _is_number(value, int | float) and 0 < value < _MOST_STATED
    else:
        least = 0 if name.endswith("_token_id") else 1
        is_usable = _is_number(value, int) and least <= value < _MOST_STATED
    if not is_usable:
        raise _unclear(part, f"states {HINTS_KEY} {name!r} as {str(value)[:60]!r}", name)
    return value


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _unclear(part: Part, what: str, value: str) -> ConfigurationError:
    return ConfigurationError(
        f"{part.files.paths[0]} {what}.",
        field="model.path",
        value=value,
        allowed="a part of Stable Diffusion 3.5",
    )
