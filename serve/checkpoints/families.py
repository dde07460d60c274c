"""What a file holds, told by its tensors: parts of SD3.5, or the name of what it is instead."""

from __future__ import annotations

import re
from collections.abc import Mapping

from serve.checkpoints.key_names import PREFIXES, Kind
from serve.checkpoints.tensor_files import TensorFiles

_SIGNS: dict[Kind, tuple[str, ...]] = {
    "transformer": (
        "joint_blocks.0.x_block.attn.qkv.weight",
        "transformer_blocks.0.attn.add_q_proj.weight",
    ),
    "vae": ("decoder.conv_in.weight",),
    "clip_l": ("text_model.embeddings.token_embedding.weight",),
    "clip_g": ("text_model.embeddings.token_embedding.weight",),
    "t5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
}
_WIDTHS: dict[int, Kind] = {768: "clip_l", 1280: "clip_g"}
# What checkpoints carry beside their parts and nothing reads.
_IDLE = re.compile(
    r"(text_encoders\.\w+\.(logit_scale|spiece_model|scaled_fp8)|model_ema\..*|model_sampling\..*"
    r"|first_stage_model\.loss\..*|.*\.position_ids)"
)


def parts_in(files: TensorFiles) -> dict[Kind, str]:
    """Return the parts of SD3.5 that files hold, with the prefix of each.

    A CLIP without prefix is told by its width, then by its file's name.
    """
    found: dict[Kind, str] = {}
    for kind, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if any(prefix + sign in files.tensors for sign in _SIGNS[kind]):
                found.setdefault(kind, prefix)
    for kind in ("transformer", "vae", "t5"):
        # A name that ends a longer one elsewhere is not a part of its own.
        if kind not in found and any(sign in files.tensors for sign in _SIGNS[kind]):
            found[kind] = ""
    sign = _SIGNS["clip_l"][0]
    if sign in files.tensors and (clip := _clip_of(files, sign)) is not None:
        found.setdefault(clip, "")
    return found


def unclaimed(files: TensorFiles, parts: Mapping[Kind, str]) -> list[str]:
    """Return the names that belong to no part and are not known to be idle."""
    if "" in parts.values():
        return []  # the part itself says which of its names it cannot place
    prefixes = tuple(parts.values())
    return sorted(
        name
        for name in files.tensors
        if not name.startswith(prefixes) and not _IDLE.fullmatch(name)
    )


def _clip_of(files: TensorFiles, sign: str) -> Kind | None:
    shape = files.tensors[sign].shape
    if len(shape) == 2 and shape[1] in _WIDTHS:
        return _WIDTHS[shape[1]]
    name = files.file_of[sign].name.lower()
    if "clip_g" in name or "bigg" in name:
        return "clip_g"
    return "clip_l" if "clip_l" in name else None


def stranger(files: TensorFiles) -> str | None:
    """Return the name of what files hold where that is not SD3.5; None if it may be."""
    names = files.tensors
    bare = {
        re.sub(r"^(model\.diffusion_model\.|diffusion_model\.|transformer\.)", "", n) for n in names
    }

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in bare)

    if any(re.search(r"\.(lora_[AB]|lora_up|lora_down|lora\.up|lora\.down)\.", n) for n in names):
        return "a LoRA, not a model"
    if any(name.startswith(("lora_unet_", "lora_te")) for name in names):
        return "a LoRA, not a model"
    if has(
        "controlnet_blocks.", "control_model.", "input_hint_block.", "controlnet_cond_embedding."
    ):
        return "a ControlNet, not a model"
    if has("single_stream_modulation."):
        return "FLUX.2"
    if has("double_blocks.", "single_transformer_blocks."):
        return "FLUX"
    if has("joint_blocks.0.", "transformer_blocks.0.attn.add_q_proj"):
        signs = (
            "joint_blocks.0.x_block.attn.ln_q.weight",
            "transformer_blocks.0.attn.norm_q.weight",
        )
        if not bare.intersection(signs):
            return "Stable Diffusion 3.0 (its attention does not normalise queries and keys)"
        return None
    if has("conditioner.embedders.1.", "add_embedding.") or (
        has("input_blocks.") and has("label_emb.")
    ):
        return "Stable Diffusion XL"
    if has("input_blocks.", "down_blocks.", "cond_stage_model."):
        return "Stable Diffusion 1 or 2"
    if has("decoder.conv_in.", "first_stage_model."):
        return "a VAE alone"
    if has("encoder.block.0.", "text_encoders.t5xxl."):
        return "a T5 text encoder alone"
    if has("text_model.", "text_encoders."):
        return "a CLIP text encoder alone"
    return f"no model that Kelvin knows (its first tensor is {min(names)!r})" if names else "empty"
