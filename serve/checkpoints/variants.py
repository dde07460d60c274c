"""Large, Large Turbo and Medium: how each is told, and the settings their makers recommend.

Turbo is Large distilled: its tensors have Large's names and shapes, so they cannot tell. ComfyUI
and diffusers leave steps and guidance to the user; here a setting decides, else the file's own
metadata (https://github.com/Stability-AI/ModelSpec), else its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve.model_settings import Variant

DEFAULTS: Mapping[Variant, Mapping[str, Any]] = {
    "large": {"num_inference_steps": 40, "guidance_scale": 4.5, "sampler": "dpmpp_2m"},
    "large-turbo": {"num_inference_steps": 4, "guidance_scale": 1.0, "sampler": "euler"},
    "medium": {"num_inference_steps": 50, "guidance_scale": 5.0, "sampler": "dpmpp_2m"},
}
"""What requests get that leave these out: Stability's model cards and reference code."""

NAMES: Mapping[Variant, str] = {
    "large": "Stable Diffusion 3.5 Large",
    "large-turbo": "Stable Diffusion 3.5 Large Turbo",
    "medium": "Stable Diffusion 3.5 Medium",
}
_METADATA = ("modelspec.architecture", "modelspec.title", "modelspec.implementation")


def variant_of(
    transformer: Mapping[str, Any], name: str = "", metadata: Mapping[str, str] | None = None
) -> tuple[Variant | None, str]:
    """Tell a model's variant.

    Args:
        transformer: Its configuration.
        name: Of the model or its file.
        metadata: Of its file.

    Returns:
        The variant, None for a model of another size, and what told it.
    """
    layers, heads = transformer.get("num_layers"), transformer.get("num_attention_heads")
    dual = transformer.get("dual_attention_layers")
    if layers == 24 and heads in (24, None) and dual:
        return "medium", "24 layers, the first with a second attention"
    if (layers, heads) != (38, 38):
        return None, f"{layers} layers of {heads} heads: a size of its own"
    stated = " ".join((metadata or {}).get(key, "") for key in _METADATA).lower()
    if "turbo" in stated:
        return "large-turbo", "38 layers; its metadata say Turbo"
    if "turbo" in name.lower():
        return "large-turbo", "38 layers; its name says Turbo, tensors cannot"
    return "large", "38 layers; Turbo has the same and is told by model.variant, metadata or name"
