"""Writes one model in every format in which files of SD3.5 are found.

For tests and benchmarks: the names, shapes and notes are those of the field's own files, so that
what reads these reads those. `as_original` is the inverse of `serve.checkpoints.key_names`, written
out on its own so that one checks the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.sd3.fp8 import LARGEST_E4M3

State = dict[str, Tensor]
Fp8Form = Literal["cast", "older", "newer", "metadata", "e5m2", "rows"]
FP8_FORMS: tuple[Fp8Form, ...] = ("cast", "older", "newer", "metadata", "e5m2", "rows")

TRANSFORMER = "model.diffusion_model."
VAE = "first_stage_model."
ENCODERS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
_FILES = {
    "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "clip_g.safetensors",
    "text_encoder_3": "t5xxl_fp8_e4m3fn.safetensors",
}


def original_transformer(state: State) -> State:
    """Return a diffusers transformer's tensors under Stability's names: qkv fused, halves swapped.

    Args:
        state: Weights and biases, no scales.
    """
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    out: State = {}
    for ours, theirs in names.items():
        for leaf in ("", ".weight", ".bias"):
            if ours + leaf in state:
                out[theirs + leaf] = state[ours + leaf]
    layers = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("transformer_blocks."))
    for leaf in (".weight", ".bias"):
        out["final_layer.adaLN_modulation.1" + leaf] = _swapped(state["norm_out.linear" + leaf])
        for index in range(layers):
            block, theirs = f"transformer_blocks.{index}.", f"joint_blocks.{index}."
            for name, value in _block(state, block, leaf, index == layers - 1):
                out[theirs + name + leaf] = value
    return out


def _block(state: State, block: str, leaf: str, last: bool) -> Iterator[tuple[str, Tensor]]:
    fused = {
        "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    for theirs, three in fused.items():
        if block + three[0] + leaf in state:
            yield theirs + ".qkv", torch.cat([state[block + name + leaf] for name in three])
    singles = {
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn.ln_q": "attn.norm_q",
        "x_block.attn.ln_k": "attn.norm_k",
        "x_block.attn2.proj": "attn2.to_out.0",
        "x_block.attn2.ln_q": "attn2.norm_q",
        "x_block.attn2.ln_k": "attn2.norm_k",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.attn.ln_q": "attn.norm_added_q",
        "context_block.attn.ln_k": "attn.norm_added_k",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
    }
    for theirs, ours in singles.items():
        if block + ours + leaf in state:
            value = state[block + ours + leaf]
            swap = last and ours == "norm1_context.linear"
            yield theirs, _swapped(value) if swap else value


def original_vae(state: State) -> State:
    """Return a diffusers VAE's tensors under the original names."""
    highest = max(int(n.split(".")[2]) for n in state if n.startswith("decoder.up_blocks."))
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    out: State = {}
    for name, value in state.items():
        half, *rest = name.split(".")
        leaf = rest[-1]
        if rest[0] == "mid_block":
            at = int(rest[2])
            if rest[1] == "attentions":
                stored = attention[rest[3]]
                if stored != "norm" and leaf == "weight":
                    value = value[:, :, None, None]
                theirs = f"{half}.mid.attn_1.{stored}.{leaf}"
            else:
                theirs = f"{half}.mid.block_{at + 1}.{_shortcut(rest[3])}.{leaf}"
        elif rest[0] in ("up_blocks", "down_blocks"):
            way = rest[0].removesuffix("_blocks")
            level = highest - int(rest[1]) if way == "up" else int(rest[1])
            if rest[2].endswith("samplers"):
                theirs = f"{half}.{way}.{level}.{way}sample.conv.{leaf}"
            else:
                theirs = f"{half}.{way}.{level}.block.{rest[3]}.{_shortcut(rest[4])}.{leaf}"
        else:
            theirs = f"{half}.{rest[0].replace('conv_norm_out', 'norm_out')}.{leaf}"
        out[theirs] = value
    return out


def in_fp8(
    state: State,
    form: Fp8Form,
    wanted: Callable[[str], bool],
    prefix: str = "",
    *,
    full_precision: bool = False,
    input_scale: float | None = None,
) -> tuple[State, dict[str, str]]:
    """Quantise some matrices of a state and write down how, in one of the forms.

    Args:
        state: Of one part, without prefix; scales of powers of two where the form has one scale a
            tensor, so that the values are the same in every form that has scales.
        form: `cast`, `older`, `newer`, `metadata`, `e5m2` (as `newer`), `rows` (Kelvin's own).
        wanted: Which `X.weight` become FP8.
        prefix: Put before every name.
        full_precision: Say that products are to be made in ordinary precision.
        input_scale: Of every layer; not in `cast`.

    Returns:
        The part's tensors, and what belongs into the file's metadata.
    """
    out: State = {}
    layers: dict[str, dict[str, Any]] = {}
    dtype = torch.float8_e5m2 if form == "e5m2" else torch.float8_e4m3fn
    format_name = "float8_e5m2" if form == "e5m2" else "float8_e4m3fn"
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if module == name or value.dim() != 2 or not wanted(name):
            out[prefix + name] = value
            continue
        if form == "cast":
            out[prefix + name] = value.float().clamp(-LARGEST_E4M3, LARGEST_E4M3).to(dtype)
            continue
        scale = power_of_two_scale(value)
        out[prefix + name] = (value.float() / scale).to(dtype)
        weight_key, input_key = "weight_scale", "input_scale"
        if form == "older":
            weight_key, input_key = "scale_weight", "scale_input"
        out[f"{prefix}{module}.{weight_key}"] = (
            scale.expand(len(value)).contiguous() if form == "rows" else scale
        )
        if input_scale is not None:
            out[f"{prefix}{module}.{input_key}"] = torch.tensor(input_scale)
        note: dict[str, Any] = {"format": format_name}
        if full_precision:
            note["full_precision_matrix_mult"] = True
        layers[prefix + module] = note
    metadata: dict[str, str] = {}
    if form == "older":
        out[prefix + "scaled_fp8"] = torch.zeros(2 if full_precision else 0, dtype=dtype)
    elif form == "metadata":
        noted = {"format_version": "1.0", "layers": layers}
        metadata["_quantization_metadata"] = json.dumps(noted)
    elif form in ("newer", "e5m2"):
        for module, note in layers.items():
            text = json.dumps(note).encode()
            out[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return out, metadata


def power_of_two_scale(value: Tensor) -> Tensor:
    """Return the least power of two by which a tensor fits E4M3, float32 scalar."""
    largest = value.float().abs().max().clamp(min=1e-30)
    return torch.exp2(torch.ceil(torch.log2(largest / LARGEST_E4M3)))


def read_part(folder: Path) -> State:
    """Return a Diffusers part's tensors with every scale multiplied in: float32."""
    stored = {
        n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()
    }
    out: State = {}
    for name, value in stored.items():
        if name.endswith(".weight_scale"):
            continue
        scale = stored.get(name + "_scale")
        out[name] = value.float() if scale is None else value.float() * scale[:, None]
    return out


def hints_of(model_dir: Path) -> dict[str, Any]:
    """Return what no tensor tells of a Diffusers directory, for `kelvin.hints`."""

    def config(folder: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((model_dir / folder / "config.json").read_text())
        return loaded

    clip = ("num_attention_heads", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id")
    own = json.loads((model_dir / "kelvin.json").read_text())
    said: tuple[str, ...] = ("license", "num_inference_steps", "guidance_scale", "width", "height")
    said += ("min_size", "max_size", "max_sequence_length", "sampler", "scheduler", "shift")
    found: dict[str, Any] = {
        "transformer": {"sample_size": config("transformer")["sample_size"]},
        "clip_l": {name: config("text_encoder")[name] for name in clip},
        "clip_g": {name: config("text_encoder_2")[name] for name in clip},
        "vae": {
            name: config("vae")[name]
            for name in ("norm_num_groups", "scaling_factor", "shift_factor")
        },
        "defaults": {name: own[name] for name in said if name in own},
    }
    if (model_dir / "latent_rgb.json").exists():
        found["latent_rgb"] = json.loads((model_dir / "latent_rgb.json").read_text())
    return found


def is_block_linear(name: str) -> bool:
    """Whether the original name is that of a matrix inside the blocks."""
    return name.startswith("joint_blocks.") and name.endswith(".weight") and ".ln_" not in name


def is_t5_linear(name: str) -> bool:
    """Whether the name is that of a Linear of T5's blocks."""
    return name.startswith("encoder.block.") and "relative_attention_bias" not in name


def write_comfyui(
    model_dir: Path,
    models_dir: Path,
    *,
    name: str = "stable-diffusion-3.5-fp8.safetensors",
    form: Fp8Form | None = "newer",
    dtype: torch.dtype = torch.float16,
    all_in_one: bool = False,
    with_t5: bool = True,
    full_precision: bool = False,
) -> Path:
    """Write a model into ComfyUI's folders under the names that its users' files have.

    Args:
        model_dir: In Diffusers layout, Kelvin's own FP8 or plain.
        models_dir: ComfyUI's `models`, made.
        name: Of the checkpoint.
        form: Of FP8 in transformer and T5; None: everything in `dtype`.
        dtype: Of what is not FP8.
        all_in_one: Text encoders and VAE inside the checkpoint.
        with_t5: Write T5.
        full_precision: See `in_fp8`.

    Returns:
        The checkpoint.
    """
    parts: dict[str, tuple[State, dict[str, str]]] = {}

    def put(folder: str, state: State, wanted: Callable[[str], bool], prefix: str) -> None:
        plain = {key: value.to(dtype).contiguous() for key, value in state.items()}
        if form is None or not any(wanted(key) for key in state):
            parts[folder] = {prefix + key: value for key, value in plain.items()}, {}
            return
        # From the float32 values: casting to `dtype` first would round twice.
        exact = {key: state[key] if wanted(key) else value for key, value in plain.items()}
        parts[folder] = in_fp8(exact, form, wanted, prefix, full_precision=full_precision)

    transformer = original_transformer(read_part(model_dir / "transformer"))
    put("transformer", transformer, is_block_linear, TRANSFORMER)
    put(
        "vae",
        original_vae(read_part(model_dir / "vae")),
        lambda _: False,
        VAE if all_in_one else "",
    )
    for folder, prefix in ENCODERS.items():
        if folder != "text_encoder_3" or with_t5:
            wanted = is_t5_linear if folder == "text_encoder_3" else lambda _: False
            put(folder, read_part(model_dir / folder), wanted, prefix if all_in_one else "")
    hints = {"kelvin.hints": json.dumps(hints_of(model_dir))}
    checkpoint = models_dir / "checkpoints" / name
    together = list(parts) if all_in_one else ["transformer"]
    _write(checkpoint, [parts.pop(folder) for folder in together], hints)
    for folder, part in parts.items():
        where = models_dir / "vae" / "sd35_vae.safetensors"
        if folder != "vae":
            where = models_dir / "text_encoders" / _FILES[folder]
        _write(where, [part], hints)
    return checkpoint


def _write(path: Path, parts: list[tuple[State, dict[str, str]]], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state: State = {}
    layers: dict[str, Any] = {}
    for tensors, notes in parts:
        state |= tensors
        if "_quantization_metadata" in notes:
            layers |= json.loads(notes["_quantization_metadata"])["layers"]
    if layers:
        noted = {"format_version": "1.0", "layers": layers}
        metadata = metadata | {"_quantization_metadata": json.dumps(noted)}
    save_file({n: t.contiguous() for n, t in state.items()}, path, {"format": "pt"} | metadata)


def _swapped(value: Tensor) -> Tensor:
    return torch.cat(value.chunk(2)[::-1])


def _shortcut(name: str) -> str:
    return "nin_shortcut" if name == "conv_shortcut" else name
