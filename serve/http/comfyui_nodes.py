"""The nodes of ComfyUI that SD3.5 workflows are made of: names, inputs, outputs, as it lists them.

Written after what ComfyUI's `/object_info` tells (`nodes.py`, `comfy_extras/nodes_sd3.py`); where
Kelvin takes less, the list or the bounds say so, and a workflow that asks for more is told what is
left, in ComfyUI's own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, get_args

from serve.lora_choice import LARGEST_WEIGHT
from serve.requests import LARGEST_NUM_IMAGES, LARGEST_SEED, Sampler, Scheduler

List = Literal["checkpoints", "loras", "text_encoders", "vaes", "images"]
"""What an input chooses from where only the service knows what there is."""

SAMPLERS: Final[dict[str, Sampler]] = {
    **{name: name for name in get_args(Sampler)},
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",  # the same, drawing its noise on the card
}
_LARGEST_SIDE = 16_384  # ComfyUI's; the model's own is checked with the request
TEXT_ENCODERS: Final = (
    "clip_l.safetensors",
    "clip_g.safetensors",
    "t5xxl_fp16.safetensors",
    "t5xxl_fp8_e4m3fn.safetensors",
    "t5xxl_fp8_e4m3fn_scaled.safetensors",
)
"""Names under which SD3.5's text encoders are published; the served model's own stand for them."""
VAES: Final = ("sd3_vae.safetensors", "sd3.5_vae.safetensors", "sd35_vae.safetensors")


@dataclass(frozen=True)
class Input:
    """One input of a node.

    Attributes:
        kind: INT, FLOAT, STRING, BOOLEAN, COMBO, or the type of a link.
        choices: Of a COMBO: its values, or which of the service's lists they are.
        options: As ComfyUI shows them: default, min, max, step.
        required: Whether it must be there.
    """

    kind: str
    choices: tuple[str, ...] | List = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    required: bool = True


@dataclass(frozen=True)
class NodeType:
    """One class of nodes."""

    name: str
    category: str
    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    display_name: str = ""
    output_names: tuple[str, ...] = ()
    is_output: bool = False


def _link(kind: str) -> Input:
    return Input(kind)


def _int(default: int, least: int, most: int, step: int = 1) -> Input:
    return Input("INT", options={"default": default, "min": least, "max": most, "step": step})


def _float(default: float, least: float, most: float, step: float) -> Input:
    return Input("FLOAT", options={"default": default, "min": least, "max": most, "step": step})


def _text() -> Input:
    return Input("STRING", options={"multiline": True, "dynamicPrompts": True})


def _of(choices: tuple[str, ...] | List, **options: Any) -> Input:
    return Input("COMBO", choices, options)


def _optional(of: Input) -> Input:
    return Input(of.kind, of.choices, of.options, required=False)


def _empty_latent(name: str, display: str, category: str, side: int, step: int) -> NodeType:
    sides = _int(side, 16, _LARGEST_SIDE, step)
    batch = _int(1, 1, LARGEST_NUM_IMAGES)
    inputs = {"width": sides, "height": sides, "batch_size": batch}
    return NodeType(name, category, inputs, ("LATENT",), display)


def _primitive(name: str, kind: str, value: Input) -> NodeType:
    return NodeType(name, "utils/primitive", {"value": value}, (kind,))


_CLIP_TYPES = _of(("sd3",))
_DEVICE = _optional(_of(("default", "cpu")))
_WEIGHT = _float(1.0, -LARGEST_WEIGHT, LARGEST_WEIGHT, 0.01)
_PERCENT = _float(0.0, 0.0, 1.0, 0.001)
_ENCODER = _of("text_encoders")
_PREFIX = Input("STRING", options={"default": "ComfyUI"})
_CONDITIONING = _link("CONDITIONING")

_NODES: Final = (
    NodeType(
        "CheckpointLoaderSimple",
        "loaders",
        {"ckpt_name": _of("checkpoints")},
        ("MODEL", "CLIP", "VAE"),
        "Load Checkpoint",
    ),
    NodeType(
        "UNETLoader",
        "advanced/loaders",
        {
            "unet_name": _of("checkpoints"),
            "weight_dtype": _of(("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")),
        },
        ("MODEL",),
        "Load Diffusion Model",
    ),
    NodeType("VAELoader", "loaders", {"vae_name": _of("vaes")}, ("VAE",), "Load VAE"),
    NodeType(
        "CLIPLoader",
        "advanced/loaders",
        {"clip_name": _ENCODER, "type": _CLIP_TYPES, "device": _DEVICE},
        ("CLIP",),
        "Load CLIP",
    ),
    NodeType(
        "DualCLIPLoader",
        "advanced/loaders",
        {"clip_name1": _ENCODER, "clip_name2": _ENCODER, "type": _CLIP_TYPES, "device": _DEVICE},
        ("CLIP",),
    ),
    NodeType(
        "TripleCLIPLoader",
        "advanced/loaders",
        {"clip_name1": _ENCODER, "clip_name2": _ENCODER, "clip_name3": _ENCODER},
        ("CLIP",),
    ),
    NodeType(
        "LoraLoader",
        "loaders",
        {
            "model": _link("MODEL"),
            "clip": _link("CLIP"),
            "lora_name": _of("loras"),
            "strength_model": _WEIGHT,
            "strength_clip": _WEIGHT,
        },
        ("MODEL", "CLIP"),
        "Load LoRA",
    ),
    NodeType(
        "LoraLoaderModelOnly",
        "loaders",
        {"model": _link("MODEL"), "lora_name": _of("loras"), "strength_model": _WEIGHT},
        ("MODEL",),
    ),
    NodeType(
        "ModelSamplingSD3",
        "advanced/model",
        {"model": _link("MODEL"), "shift": _float(3.0, 0.0, 100.0, 0.01)},
        ("MODEL",),
    ),
    NodeType(
        "CLIPTextEncode",
        "conditioning",
        {"text": _text(), "clip": _link("CLIP")},
        ("CONDITIONING",),
        "CLIP Text Encode (Prompt)",
    ),
    NodeType(
        "CLIPTextEncodeSD3",
        "advanced/conditioning",
        {
            "clip": _link("CLIP"),
            "clip_l": _text(),
            "clip_g": _text(),
            "t5xxl": _text(),
            "empty_padding": _of(("none", "empty_prompt")),
        },
        ("CONDITIONING",),
    ),
    NodeType(
        "ConditioningZeroOut",
        "advanced/conditioning",
        {"conditioning": _CONDITIONING},
        ("CONDITIONING",),
    ),
    NodeType(
        "ConditioningSetTimestepRange",
        "advanced/conditioning",
        {
            "conditioning": _CONDITIONING,
            "start": _PERCENT,
            "end": _float(1.0, 0.0, 1.0, 0.001),
        },
        ("CONDITIONING",),
    ),
    NodeType(
        "ConditioningCombine",
        "conditioning",
        {"conditioning_1": _CONDITIONING, "conditioning_2": _CONDITIONING},
        ("CONDITIONING",),
        "Conditioning (Combine)",
    ),
    _empty_latent("EmptyLatentImage", "Empty Latent Image", "latent", 512, 8),
    _empty_latent("EmptySD3LatentImage", "EmptySD3LatentImage", "latent/sd3", 1024, 16),
    NodeType(
        "KSampler",
        "sampling",
        {
            "model": _link("MODEL"),
            "seed": _int(0, 0, LARGEST_SEED),
            "steps": _int(20, 1, 200),
            "cfg": _float(8.0, 0.0, 100.0, 0.1),
            "sampler_name": _of(tuple(SAMPLERS)),
            "scheduler": _of(get_args(Scheduler)),
            "positive": _CONDITIONING,
            "negative": _CONDITIONING,
            "latent_image": _link("LATENT"),
            "denoise": _float(1.0, 0.0, 1.0, 0.01),
        },
        ("LATENT",),
    ),
    NodeType(
        "VAEDecode",
        "latent",
        {"samples": _link("LATENT"), "vae": _link("VAE")},
        ("IMAGE",),
        "VAE Decode",
    ),
    NodeType(
        "VAEDecodeTiled",
        "_for_testing",
        {
            "samples": _link("LATENT"),
            "vae": _link("VAE"),
            "tile_size": _int(512, 64, 4096, 32),
            "overlap": _optional(_int(64, 0, 4096, 32)),
            "temporal_size": _optional(_int(64, 8, 4096, 4)),
            "temporal_overlap": _optional(_int(8, 4, 4096, 4)),
        },
        ("IMAGE",),
        "VAE Decode (Tiled)",
    ),
    NodeType(
        "VAEEncode",
        "latent",
        {"pixels": _link("IMAGE"), "vae": _link("VAE")},
        ("LATENT",),
        "VAE Encode",
    ),
    NodeType(
        "LoadImage",
        "image",
        {"image": _of("images", image_upload=True)},
        ("IMAGE", "MASK"),
        "Load Image",
    ),
    NodeType(
        "SaveImage",
        "image",
        {"images": _link("IMAGE"), "filename_prefix": _PREFIX},
        (),
        "Save Image",
        is_output=True,
    ),
    NodeType(
        "PreviewImage",
        "image",
        {"images": _link("IMAGE")},
        (),
        "Preview Image",
        is_output=True,
    ),
    NodeType("SaveImageWebsocket", "api/image", {"images": _link("IMAGE")}, (), is_output=True),
    _primitive("PrimitiveInt", "INT", Input("INT", options={"control_after_generate": True})),
    _primitive("PrimitiveFloat", "FLOAT", Input("FLOAT")),
    _primitive("PrimitiveBoolean", "BOOLEAN", Input("BOOLEAN")),
    _primitive("PrimitiveString", "STRING", Input("STRING")),
    _primitive("PrimitiveStringMultiline", "STRING", _text()),
)
NODES: Final[dict[str, NodeType]] = {node.name: node for node in _NODES}
PRIMITIVES: Final = frozenset(node.name for node in _NODES if node.name.startswith("Primitive"))

_NOT_YET: Final = (
    "*ControlNet*",
    "SkipLayerGuidance*",
    "KSamplerAdvanced",
    "KSamplerSelect",
    "Sampler[CDELS]*",
    "*Scheduler",
    "*Guider",
    "RandomNoise",
    "DisableNoise",
    "*Sigmas",
    "*Upscale*",
    "ImageScale*",
    "ImageCrop",
    "ImageInvert",
    "ImageBatch",
    "ImagePadForOutpaint",
    "Latent?*",
    "RepeatLatentBatch",
    "SetLatentNoiseMask",
    "VAEEncodeForInpaint",
    "VAEEncodeTiled",
    "Inpaint*",
    "LoadImageMask",
    "LoadImageOutput",
    "Conditioning?*",
    "CLIPSetLastLayer",
    "CLIPVision*",
    "CLIPTextEncode?*",
    "CLIPMerge*",
    "Model?*",
    "CheckpointLoader",
    "QuadrupleCLIPLoader",
    "FreeU*",
    "RescaleCFG",
    "PerturbedAttentionGuidance",
    "Self-Attention Guidance",
    "IPAdapter*",
)
"""ComfyUI's own that its users know; patterns, asked after `NODES`."""


def is_known(class_type: str) -> bool:
    """Return whether ComfyUI has such nodes which Kelvin does not take yet."""
    return any(fnmatchcase(class_type, pattern) for pattern in _NOT_YET)


@dataclass(frozen=True)
class Catalogue:
    """What the service's lists hold for one caller.

    Attributes:
        checkpoints: File name -> name of the model.
        loras: File names.
        images: Name of an uploaded picture -> the `init_image` that it means.
    """

    checkpoints: Mapping[str, str]
    loras: tuple[str, ...] = ()
    images: Mapping[str, str] = field(default_factory=dict)

    def choices(self, source: Input) -> tuple[str, ...]:
        """Return the values of a COMBO."""
        if not isinstance(source.choices, str):
            return source.choices
        lists = {
            "checkpoints": tuple(self.checkpoints),
            "loras": self.loras,
            "text_encoders": TEXT_ENCODERS,
            "vaes": VAES,
            "images": tuple(self.images),
        }
        return lists[source.choices]


def shown_config(source: Input, catalogue: Catalogue) -> list[Any]:
    """Return an input as `/object_info` and node errors show it: `[type or list, options]`."""
    kind: Any = list(catalogue.choices(source)) if source.kind == "COMBO" else source.kind
    return [kind, dict(source.options)] if source.options else [kind]


def shown_node(node: NodeType, catalogue: Catalogue) -> dict[str, Any]:
    """Return what `/object_info` says of a class of nodes."""
    groups: dict[str, dict[str, Any]] = {"required": {}}
    for name, source in node.inputs.items():
        group = groups.setdefault("required" if source.required else "optional", {})
        group[name] = shown_config(source, catalogue)
    return {
        "input": groups,
        "input_order": {group: list(inputs) for group, inputs in groups.items()},
        "is_input_list": False,
        "output": list(node.outputs),
        "output_is_list": [False] * len(node.outputs),
        "output_name": list(node.output_names or node.outputs),
        "name": node.name,
        "display_name": node.display_name or node.name,
        "description": "",
        "python_module": "nodes",
        "category": node.category,
        "output_node": node.is_output,
    }
