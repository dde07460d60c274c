"""The names that LoRA files give their tensors, told apart and led back to diffusers' modules.

Three families, each with variants that the field's loaders read as well (ComfyUI `comfy/lora.py`,
kohya-ss `networks/lora_sd3.py`, diffusers and PEFT):

- dotted, diffusers: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`,
  `text_encoder_2.text_model...`; `lora_B`, `.lora.down/.lora.up`, `base_model.model.` before;
- dotted, original: `diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down.weight`;
- flattened, kohya: `lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight`, `lora_te1_...`, and
  OneTrainer's `lora_transformer_transformer_blocks_0_attn_to_q`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from serve.checkpoints.key_names import Kind, Target, original_modules, translator

Role = Literal["down", "up", "alpha"]

_ENDS: tuple[tuple[str, Role], ...] = (
    (r"(.+)\.lora_(?:down|A)(?:\.[\w-]+)?\.weight", "down"),
    (r"(.+)\.lora_(?:up|B)(?:\.[\w-]+)?\.weight", "up"),
    (r"(.+?)(?:\.|_)lora\.down\.weight", "down"),
    (r"(.+?)(?:\.|_)lora\.up\.weight", "up"),
    (r"(.+)\.lora_linear_layer\.down\.weight", "down"),
    (r"(.+)\.lora_linear_layer\.up\.weight", "up"),
    (r"(.+)\.alpha", "alpha"),
)
_OTHER_KINDS = (
    (r"dora_scale|lora_magnitude_vector", "DoRA"),
    (r"\.lokr_", "LoKr"),
    (r"\.hada_", "LoHa"),
    (r"\.b?oft_", "OFT"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.lora_mid\.", "LoRA of convolutions"),
    (r"\.lora_(up|B)\..*bias$|\.lora_(up|B)\.bias$", "LoRA with biases"),
    (r"\.(diff|diff_b|w_norm|b_norm|set_weight)$", "whole differences of weights"),
    (r"\.ia3_|\.on_input$", "IA3"),
)
_DOTTED: tuple[tuple[str, Kind], ...] = (
    ("base_model.model.transformer.", "transformer"),
    ("base_model.model.diffusion_model.", "transformer"),
    ("base_model.model.", "transformer"),
    ("model.diffusion_model.", "transformer"),
    ("diffusion_model.", "transformer"),
    ("transformer.", "transformer"),
    ("text_encoders.clip_l.transformer.", "clip_l"),
    ("text_encoders.clip_g.transformer.", "clip_g"),
    ("text_encoders.t5xxl.transformer.", "t5"),
    ("text_encoder_3.", "t5"),
    ("text_encoder_2.", "clip_g"),
    ("text_encoder.", "clip_l"),
)
_FLATTENED: tuple[tuple[str, Kind], ...] = (
    ("lora_unet_", "transformer"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "transformer"),
    ("lora_te1_", "clip_l"),
    ("lora_te2_", "clip_g"),
    ("lora_te3_", "t5"),
    ("lora_te_", "clip_l"),
)
_STRANGERS = (
    (r"double_blocks[._]|single_blocks[._]|single_transformer_blocks[._]", "FLUX"),
    (
        r"(^|[._])(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]",
        "Stable Diffusion 1, 2 or XL",
    ),
)


@dataclass(frozen=True, slots=True)
class Place:
    """What a file's module adapts: one module of a part, or several whose rows it holds."""

    part: Kind
    targets: tuple[Target, ...]


def role_of(name: str) -> tuple[str, Role] | None:
    """Return a tensor's module, as the file calls it, and what it is there; None: neither."""
    for pattern, role in _ENDS:
        if match := re.fullmatch(pattern, name):
            return match[1], role
    return None


def other_kind(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first tensor that belongs to a relative of LoRA, and its name; None: none does."""
    for name in names:
        for pattern, kind in _OTHER_KINDS:
            if re.search(pattern, name):
                return name, kind
    return None


def stranger_of(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first tensor that adapts another kind of model, and which; None: none does."""
    for name in names:
        for pattern, base in _STRANGERS:
            if re.search(pattern, name):
                return name, base
    return None


class Places:
    """Leads module names back to a model's own.

    Args:
        modules: Linear layers of each part, by diffusers' and transformers' names.
    """

    def __init__(self, modules: Mapping[Kind, Iterable[str]]) -> None:
        self._own = {part: set(names) for part, names in modules.items()}
        blocks = self._own.get("transformer", set())
        originals = original_modules(blocks)
        translate = translator("transformer", originals)
        self._targets: dict[Kind, dict[str, tuple[Target, ...]]] = {
            part: {name: (Target(name),) for name in names} for part, names in self._own.items()
        }
        self._targets.setdefault("transformer", {}).update(
            {name: translate(name) for name in originals}
        )
        self._flat: dict[Kind, dict[str, tuple[Target, ...]]] = {
            part: {_flat(name): targets for name, targets in known.items()}
            for part, known in self._targets.items()
        }

    def of(self, module: str) -> Place | None:
        """Return what a file's module adapts; None where that is not of the model."""
        for prefix, part in _FLATTENED:
            if module.startswith(prefix):
                return self._found(part, self._flat, _flat(module.removeprefix(prefix)))
        for prefix, part in _DOTTED:
            if module.startswith(prefix):
                return self._found(part, self._targets, _bare(module.removeprefix(prefix)))
        return self._found("transformer", self._targets, _bare(module))

    @staticmethod
    def _found(
        part: Kind, known: Mapping[Kind, Mapping[str, tuple[Target, ...]]], name: str
    ) -> Place | None:
        targets = known.get(part, {}).get(name)
        return None if targets is None else Place(part, targets)


def part_of(module: str) -> Kind | None:
    """Return the part that a module's prefix names; None where it has none."""
    for prefix, part in (*_FLATTENED, *_DOTTED):
        if module.startswith(prefix):
            return part
    return None


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _bare(name: str) -> str:
    # diffusers' own attention processors once stood between a module and its projection.
    return name.replace(".processor.to_", ".to_").replace("to_out_lora", "to_out.0")
