"""A chain of a ComfyUI workflow as a GenerateRequest; what is wrong with it is a node's error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serve.errors import KelvinError
from serve.http.comfyui_chains import Chain, LoraStrength
from serve.http.comfyui_graph import NodeError, not_yet
from serve.lora_choice import SUFFIX
from serve.requests import GenerateRequest

_PREVIEWS = 8  # of a picture: each is an event that followers are sent


def request_of(
    chain: Chain,
    has_text_part: Callable[[str], bool],
    *,
    with_previews: bool,
    **fields: Any,
) -> GenerateRequest:
    """Return the request of a chain.

    Args:
        chain: As it was read.
        has_text_part: Whether a LoRA, by its file name, adapts text encoders.
        with_previews: Whether somebody looks at them.
        **fields: Of the request, that the workflow does not say.

    Raises:
        NodeError: Kelvin does not take it; names the node that says so.
    """
    steps = chain.fields["num_inference_steps"]
    if with_previews and isinstance(steps, int):
        fields["preview_every"] = min(200, max(1, steps // _PREVIEWS))
    loras = _loras(chain.loras, has_text_part)
    asked = {**chain.fields, "loras": loras, **fields}
    try:
        return GenerateRequest.model_validate(asked)
    except KelvinError as error:
        raise node_error(chain, error) from None


def node_error(chain: Chain, error: KelvinError) -> NodeError:
    """Return what a refused request is to the node that its field comes from.

    Args:
        chain: That the request was made of.
        error: Of 4xx; one without a field of the workflow is told of the sampler.
    """
    field = (error.field or "").split(".")[0]
    node, source = chain.sources.get(field, (chain.sampler, ""))
    if field == "loras" and chain.loras:
        node, source = chain.loras[0].node, "lora_name"
        named = [each.node for each in chain.loras if _name(each.file) == error.value]
        node = named[0] if named else node
    details = ": ".join(filter(None, (source, error.allowed)))
    return NodeError(
        node,
        "custom_validation_failed" if error.code == "invalid_request" else error.code,
        error.message,
        details,
        input_name=source,
        field=error.field,
        received_value=error.value,
        allowed=error.allowed,
        code=error.code,
    )


def _loras(
    strengths: list[LoraStrength], has_text_part: Callable[[str], bool]
) -> tuple[Mapping[str, Any], ...]:
    """Return LoRAs with one weight each; what is loaded twice has the sum of both."""
    weights: dict[str, float] = {}
    for lora in strengths:
        if lora.model == 0 and not lora.clip:
            continue
        if lora.clip != lora.model and has_text_part(lora.file):
            raise not_yet(
                lora.node,
                f"Strength {lora.model:g} in the model and {lora.clip or 0:g} in the text encoders",
                "the same strength_model and strength_clip, its clip used by both prompts",
                input_name="strength_clip",
            )
        name = _name(lora.file)
        weights[name] = weights.get(name, 0.0) + lora.model
    return tuple({"name": name, "weight": weight} for name, weight in weights.items())


def _name(file: str) -> str:
    return file.removesuffix(SUFFIX)
