"""The original key names of SD3.5's files, translated to those of diffusers and transformers.

The original names are Stability's own (`joint_blocks.N.x_block.attn.qkv`), which ComfyUI's files
keep. What one stored tensor becomes is the same as in diffusers' converters
(`convert_sd3_transformer_checkpoint_to_diffusers`, `convert_ldm_vae_checkpoint`); a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["transformer", "clip_l", "clip_g", "t5", "vae"]

DIFFUSERS: Mapping[Kind, str] = {
    "transformer": "transformer",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
    "vae": "vae",
}
"""Each part's folder in a Diffusers directory; in diffusers' LoRAs names begin with it."""

PREFIXES: dict[Kind, tuple[str, ...]] = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    "clip_g": ("text_encoders.clip_g.transformer.", "text_encoders.clip_g."),
    "t5": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
}
"""What stands before a part's names where one file holds several; longer ones first."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a stored module is in diffusers' naming.

    Attributes:
        module: Its name there.
        part: (i, n): the i-th of n equal parts of its rows; None: all of it.
        swapped: The halves of its rows change places.
        squeezed: A 1x1 convolution there, a Linear here.
    """

    module: str
    part: tuple[int, int] | None = None
    swapped: bool = False
    squeezed: bool = False


def translator(kind: Kind, modules: set[str]) -> Callable[[str], tuple[Target, ...]]:
    """Return what translates a stored module's name.

    Args:
        kind: Of the part.
        modules: All its modules, prefix removed. Names that are diffusers' already stay.
    """
    if kind == "transformer" and any(name.startswith("joint_blocks.") for name in modules):
        return _Transformer(modules)
    if kind == "vae" and any(name.startswith("decoder.up.") for name in modules):
        return _Vae(modules)
    return lambda module: (Target(module),)


_TRANSFORMER = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
}
_STREAMS = {
    "x_block": {
        "attn.proj": "attn.to_out.0",
        "attn.ln_q": "attn.norm_q",
        "attn.ln_k": "attn.norm_k",
        "attn2.proj": "attn2.to_out.0",
        "attn2.ln_q": "attn2.norm_q",
        "attn2.ln_k": "attn2.norm_k",
        "adaLN_modulation.1": "norm1.linear",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    },
    "context_block": {
        "attn.proj": "attn.to_add_out",
        "attn.ln_q": "attn.norm_added_q",
        "attn.ln_k": "attn.norm_added_k",
        "adaLN_modulation.1": "norm1_context.linear",
        "mlp.fc1": "ff_context.net.0.proj",
        "mlp.fc2": "ff_context.net.2",
    },
}
_FUSED = {
    ("x_block", "attn.qkv"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("x_block", "attn2.qkv"): ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ("context_block", "attn.qkv"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_BLOCK = re.compile(r"joint_blocks\.(\d{1,4})\.(x_block|context_block)\.(.+)")


class _Transformer:
    def __init__(self, modules: set[str]) -> None:
        found = (_BLOCK.fullmatch(name) for name in modules)
        self.last = max((int(match[1]) for match in found if match), default=-1)

    def __call__(self, module: str) -> tuple[Target, ...]:
        if module in _TRANSFORMER:
            return (Target(_TRANSFORMER[module]),)
        if module == "final_layer.adaLN_modulation.1":
            # The original splits its product into shift and scale, diffusers into scale and shift.
            return (Target("norm_out.linear", swapped=True),)
        match = _BLOCK.fullmatch(module)
        if match is None:
            return (Target(module),)
        index, stream, rest = int(match[1]), match[2], match[3]
        block = f"transformer_blocks.{index}."
        if (stream, rest) in _FUSED:
            names = _FUSED[stream, rest]
            return tuple(Target(block + name, (at, 3)) for at, name in enumerate(names))
        if rest not in _STREAMS[stream]:
            return (Target(module),)
        # The last block only reads the text: its modulation is a final layer's.
        swapped = index == self.last and stream == "context_block" and rest.startswith("adaLN")
        return (Target(block + _STREAMS[stream][rest], swapped=swapped),)


def original_modules(modules: set[str]) -> set[str]:
    """Return the original names of a transformer's layers.

    Args:
        modules: By diffusers' names.
    """
    found = set()
    for index in {name.split(".")[1] for name in modules if name.startswith("transformer_blocks.")}:
        own, block = f"transformer_blocks.{index}.", f"joint_blocks.{index}."
        for stream, leaves in _STREAMS.items():
            found |= {
                f"{block}{stream}.{old}" for old, new in leaves.items() if own + new in modules
            }
        found |= {
            f"{block}{stream}.{old}"
            for (stream, old), parts in _FUSED.items()
            if own + parts[0] in modules
        }
    found |= {old for old, new in _TRANSFORMER.items() if new in modules}
    return found | ({"final_layer.adaLN_modulation.1"} if "norm_out.linear" in modules else set())


_VAE_MODULE = re.compile(r"(encoder|decoder)\.(.+)")
_VAE_LEVEL = re.compile(r"(down|up)\.(\d)\.(block\.(\d)|downsample|upsample)\.?(.*)")
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v"} | {
    "proj_out": "to_out.0"
}


class _Vae:
    def __init__(self, modules: set[str]) -> None:
        levels = (re.match(r"decoder\.up\.(\d)\.", name) for name in modules)
        self.highest = max((int(match[1]) for match in levels if match), default=0)

    def __call__(self, module: str) -> tuple[Target, ...]:
        match = _VAE_MODULE.fullmatch(module)
        if match is None:
            return (Target(module),)
        half, rest = match[1], match[2]
        rest = {"norm_out": "conv_norm_out"}.get(rest, rest)
        if rest.startswith("mid.attn_1."):
            leaf = rest.removeprefix("mid.attn_1.")
            name = f"{half}.mid_block.attentions.0.{_VAE_ATTENTION.get(leaf, leaf)}"
            return (Target(name, squeezed=leaf != "norm"),)
        if rest.startswith(("mid.block_1.", "mid.block_2.")):
            at, inner = int(rest[10]) - 1, rest[12:]
            return (Target(f"{half}.mid_block.resnets.{at}.{_resnet(inner)}"),)
        level = _VAE_LEVEL.fullmatch(rest)
        if level is None:
            return (Target(f"{half}.{rest}"),)
        way, at, inner = level[1], int(level[2]), level[5]
        if way == "up":
            at = self.highest - at  # counted from the largest resolution there, from the least here
        blocks = f"{half}.{way}_blocks.{at}."
        if level[4] is None:
            return (Target(f"{blocks}{level[3]}rs.0.{inner}"),)
        return (Target(f"{blocks}resnets.{level[4]}.{_resnet(inner)}"),)


def _resnet(inner: str) -> str:
    return "conv_shortcut" if inner == "nin_shortcut" else inner
