"""LoRA files in every spelling that is read, of one and the same LoRA."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from serve.checkpoints.key_names import Target, original_modules, translator
from serve.checkpoints.lora_file import BaseModel

TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "patch_size": 2,
    "num_layers": 3,
    "in_channels": 16,
    "out_channels": 16,
    "pos_embed_max_size": 12,
    "pooled_projection_dim": 40,
    "caption_projection_dim": 64,
    "joint_attention_dim": 24,
    "dual_attention_layers": [0, 1],
}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 16,
    "projection_dim": 20,
    "num_hidden_layers": 2,
}
T5: dict[str, Any] = {
    "d_model": 24,
    "num_heads": 2,
    "d_kv": 8,
    "vocab_size": 99,
    "num_layers": 2,
    "d_ff": 48,
    "relative_attention_num_buckets": 8,
}
BASE = BaseModel({"transformer": TRANSFORMER, "clip_l": CLIP, "clip_g": CLIP, "t5": T5})

Tensors = dict[str, torch.Tensor]


def deltas(tensors: Tensors, scale: float) -> Tensors:
    """What a LoRA by diffusers' names adds to the weights."""
    return {
        name.removesuffix(".lora_A.weight"): scale
        * (tensors[name.replace("lora_A", "lora_B")] @ tensors[name])
        for name in tensors
        if name.endswith(".lora_A.weight")
    }


def random_lora(base: BaseModel, rank: int, seed: int, *parts: str, size: float = 0.3) -> Tensors:
    """A LoRA of every layer of some parts' blocks, by diffusers' names, that shows."""
    prefixes = {"transformer": "transformer.", "clip_l": "text_encoder.", "t5": "text_encoder_3."}
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for part in parts:
        for module, (columns, inputs) in base.shapes[part].items():  # type: ignore[index]
            if "blocks." in module or "q_proj" in module or module.endswith("SelfAttention.q"):
                down = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
                up = torch.randn(columns, rank, generator=generator) * size * rank**-0.5
                tensors[f"{prefixes[part]}{module}.lora_A.weight"] = down
                tensors[f"{prefixes[part]}{module}.lora_B.weight"] = up
    return tensors


def diffusers_lora(rank: int = 4, seed: int = 0, alpha: float | None = None) -> Tensors:
    """A LoRA of every layer of the blocks and some of the text encoders, by diffusers' names.

    Query, key and value have one down matrix, as where they were trained as one.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors: Tensors = {}
    shared: dict[str, torch.Tensor] = {}
    names = {
        "transformer.": "transformer",
        "text_encoder.": "clip_l",
        "text_encoder_2.": "clip_g",
        "text_encoder_3.": "t5",
    }
    for prefix, part in names.items():
        for module, (columns, inputs) in BASE.shapes[part].items():  # type: ignore[index]
            text = "q_proj" in module or module.endswith("SelfAttention.q")
            if not (module.startswith("transformer_blocks.") or text):
                continue
            stem = module
            for leaf in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                stem = stem.replace(leaf, "add_qkv" if leaf.startswith("add") else "qkv")
            if stem not in shared:
                shared[stem] = drawn(rank, inputs)
            down = shared[stem] if part == "transformer" else drawn(rank, inputs)
            tensors[f"{prefix}{module}.lora_A.weight"] = down
            tensors[f"{prefix}{module}.lora_B.weight"] = drawn(columns, rank)
            if alpha is not None:
                tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    return tensors


def original_lora(tensors: Tensors, prefix: str = "lora_unet_", flat: bool = True) -> Tensors:
    """The same by Stability's names: fused, swapped and, if flat, with underscores as kohya's."""
    originals = original_modules(set(BASE.shapes["transformer"]))
    translate = translator("transformer", originals)
    found: Tensors = {}
    for original in sorted(originals):
        targets = translate(original)
        first = f"transformer.{targets[0].module}"
        if f"{first}.lora_A.weight" not in tensors:
            continue
        name = prefix + (original.replace(".", "_") if flat else original)
        found[f"{name}.lora_down.weight"] = tensors[f"{first}.lora_A.weight"].clone()
        found[f"{name}.lora_up.weight"] = torch.cat([_rows(tensors, each) for each in targets])
        if f"{first}.alpha" in tensors:
            found[f"{name}.alpha"] = tensors[f"{first}.alpha"]
    for prefix_there, prefix_here in (
        ("text_encoder.", "lora_te1_"),
        ("text_encoder_2.", "lora_te2_"),
        ("text_encoder_3.", "lora_te3_"),
    ):
        for name, value in tensors.items():
            if name.startswith(prefix_there):
                module, _, end = name.removeprefix(prefix_there).rpartition(".lora_")
                if not module:
                    module, _, _ = name.removeprefix(prefix_there).rpartition(".alpha")
                    found[prefix_here + module.replace(".", "_") + ".alpha"] = value
                    continue
                way = "down" if end.startswith("A") else "up"
                found[f"{prefix_here}{module.replace('.', '_')}.lora_{way}.weight"] = value
    return found


def _rows(tensors: Tensors, target: Target) -> torch.Tensor:
    rows = tensors[f"transformer.{target.module}.lora_B.weight"]
    return torch.cat(rows.chunk(2)[::-1]) if target.swapped else rows


def written(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a file; tensors that share memory are written each by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in tensors.items()}, path, metadata)
    return path
