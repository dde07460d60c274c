"""Checkpoints of real sizes without a byte of weights: a header each, and a hole."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadtest.sd35 import config
from serve.checkpoints.architecture import expected_shapes
from serve.checkpoints.header import ITEM_BITS
from serve.checkpoints.model_files import ModelFiles, find_model
from serve.config import ModelSettings

Shapes = Mapping[str, tuple[int, ...]]

NAME = "some-checkpoint.safetensors"

CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}

CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
}

T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
}

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "latent_channels": 16,
    "layers_per_block": 2,
}


def write_sparse(
    path: Path, shapes: Shapes, dtype: str | None = "BF16", metadata: Mapping[str, str] = {}
) -> Path:
    """Write a header and a hole of the size of the tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at = 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, shape in shapes.items():
        size = ITEM_BITS[dtype or "F16"] // 8
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
    return path


def original(shapes: Shapes, prefix: str = "model.diffusion_model.") -> dict[str, tuple[int, ...]]:
    """Fuse and rename a transformer's shapes by hand: qkv, and the names that tell sizes."""
    renamed = {}
    pairs = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj.": "x_embedder.proj.",
        "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
        "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
        "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
        "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
        "proj_out.": "final_layer.linear.",
        ".attn.to_q.": ".x_block.attn.qkv.",
        ".attn2.to_q.": ".x_block.attn2.qkv.",
        ".attn.add_q_proj.": ".context_block.attn.qkv.",
        ".attn.to_out.0.": ".x_block.attn.proj.",
        ".attn2.to_out.0.": ".x_block.attn2.proj.",
        ".attn.to_add_out.": ".context_block.attn.proj.",
        ".attn.norm_added_": ".context_block.attn.ln_",
        ".attn.norm_": ".x_block.attn.ln_",
        ".attn2.norm_": ".x_block.attn2.ln_",
        ".norm1.linear.": ".x_block.adaLN_modulation.1.",
        ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
        ".ff.net.0.proj.": ".x_block.mlp.fc1.",
        ".ff.net.2.": ".x_block.mlp.fc2.",
        ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
        ".ff_context.net.2.": ".context_block.mlp.fc2.",
    }
    for name, shape in shapes.items():
        if any(part in name for part in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
            continue
        for ours, theirs in pairs.items():
            if ours in name:
                name = name.replace(ours, theirs)
                break
        if ".qkv." in name:
            shape = (3 * shape[0], *shape[1:])
        renamed[prefix + name.replace("transformer_blocks.", "joint_blocks.")] = shape
    return renamed


def encoders(models_dir: Path, *, t5: bool = True, vae: bool = True) -> None:
    folder = models_dir / "text_encoders"
    write_sparse(folder / "clip_l.safetensors", expected_shapes("clip_l", CLIP_L), "F16")
    write_sparse(folder / "clip_g.safetensors", expected_shapes("clip_g", CLIP_G), "F16")
    if t5:
        shapes = expected_shapes("t5", T5)
        write_sparse(folder / "t5xxl_fp16.safetensors", shapes, "F16")
        write_sparse(folder / "t5xxl_fp8_e4m3fn.safetensors", shapes, "F8_E4M3")
    if vae:
        write_sparse(models_dir / "vae" / "sd3.safetensors", expected_shapes("vae", VAE))


def tokenizers(folder: Path) -> Path:
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "vocab.json").write_text(json.dumps({f"t{n}": n for n in range(49408)}))
        (folder / name / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "spiece.model").write_bytes(b"a model")
    (folder / "tokenizer_3" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    return folder


def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with tokenizers alone, beside caches of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    tokenizers(tmp_path / "models" / "tokenizers")
    return tmp_path / "models"


def large(**changes: Any) -> Shapes:
    return original(expected_shapes("transformer", config("large") | changes))


def found(models_dir: Path, name: str = NAME, **fields: Any) -> ModelFiles:
    return find_model(ModelSettings(path=name, models_dir=str(models_dir), **fields))


def checkpoint(models_dir: Path, shapes: Shapes, dtype: str = "BF16", **how: Any) -> Path:
    return write_sparse(models_dir / "checkpoints" / NAME, shapes, dtype, **how)
