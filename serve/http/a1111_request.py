"""AUTOMATIC1111's txt2img and img2img bodies as Kelvin's request.

Source of names and defaults: stable-diffusion-webui, modules/processing.py and
modules/api/models.py. What is left out takes the model's default here, not the web UI's: 512 pixels
and a guidance scale of 7 are Stable Diffusion 1.5's. What would change the picture and is not built
is refused; what cannot change it is taken and ignored, as is what nobody knows (the web UI and its
extensions add fields as they like), of which `warnings` tells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from serve.errors import InvalidRequest, NotSupportedYet
from serve.http.a1111_names import sampler_named, scheduler_named
from serve.requests import LARGEST_NUM_IMAGES, GenerateRequest, OutputFormat

_PREVIEW_EVERY: Final = 5  # steps, for whoever asks `/progress`; the web UI's own default is 10
_USUAL_STRENGTH: Final = 0.75  # the web UI's own
# As modules/extra_networks.py, but for a name with "<" in it: there "<a:" again and again takes the
# square of its length.
_EXTRA_NETWORK: Final = re.compile(r"<(\w+):([^<>]+)>")
_NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_FORMATS: Final[dict[str, OutputFormat]] = {
    "png": "png",
    "jpg": "jpeg",
    "jpeg": "jpeg",
    "webp": "webp",
}
# Field -> the values with which it changes nothing.
_NOT_BUILT: Final[dict[str, Callable[[Any], bool]]] = {
    "enable_hr": lambda value: not value,
    "tiling": lambda value: not value,
    "restore_faces": lambda value: not value,
    "styles": lambda value: not value,
    "script_name": lambda value: not value,
    "refiner_checkpoint": lambda value: value in (None, "", "None"),
    "subseed_strength": lambda value: not value,
    "seed_resize_from_w": lambda value: value in (None, 0, -1),
    "seed_resize_from_h": lambda value: value in (None, 0, -1),
    "s_churn": lambda value: not value,
    "s_noise": lambda value: value in (None, 1),
    "eta": lambda value: value in (None, 1),
    "mask": lambda value: value is None,
    "resize_mode": lambda value: value in (None, 0, 1),
    "firstpass_image": lambda value: value is None,
    "infotext": lambda value: not value,
    "alwayson_scripts": lambda value: not value,
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CHANGES_NOTHING: Final = _names(
    """
    do_not_save_samples do_not_save_grid save_images send_images s_tmin s_tmax s_min_uncond subseed
    hr_scale hr_upscaler hr_second_pass_steps hr_resize_x hr_resize_y hr_checkpoint_name
    hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt hr_cfg hr_distilled_cfg
    firstphase_width firstphase_height override_settings_restore_afterwards disable_extra_networks
    refiner_switch_at comments script_args force_task_id distilled_cfg_scale sampler_index
    include_init_images mask_blur mask_blur_x mask_blur_y inpainting_fill
    inpaint_full_res inpaint_full_res_padding inpainting_mask_invert initial_noise_multiplier
    latent_mask mask_round image_cfg_scale
    """
)
# Settings of the web UI that change nothing with these values.
_SETTINGS_NOT_BUILT: Final[dict[str, Callable[[Any], bool]]] = {
    "CLIP_stop_at_last_layers": lambda value: value in (None, 1),
    "sd_vae": lambda value: value in (None, "", "None", "Automatic"),
}


@dataclass(frozen=True)
class Asked:
    """What a body asks for.

    Attributes:
        request: To be made.
        batch_size: Of its pictures, as the web UI counts; it decides nothing here.
        send_images: Whether the answer is to hold the pictures.
        warnings: What was not understood.
    """

    request: GenerateRequest
    batch_size: int
    send_images: bool
    warnings: tuple[str, ...] = field(default=())


def read_txt2img(body: Any) -> Asked:
    """Return what a body of `/sdapi/v1/txt2img` asks for.

    Raises:
        InvalidRequest: Of a field in the web UI's name, or in Kelvin's where that is another.
        NotSupportedYet: Likewise.
    """
    return _asked(_checked_object(body))


def read_img2img(body: Any) -> Asked:
    """Return what a body of `/sdapi/v1/img2img` asks for; raises as `read_txt2img`.

    A start image of another shape is cut off where the web UI's `resize_mode` 0 would stretch it.
    """
    images = _checked_object(body).get("init_images")
    if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], str):
        raise InvalidRequest(
            "Image to image starts from one picture.",
            field="init_images",
            value=None if images is None else f"{type(images).__name__}",
            allowed="a list of one picture: base64 or a data: URI",
        )
    strength = body.get("denoising_strength")
    strength = _USUAL_STRENGTH if strength is None else _number(strength)
    return _asked(body, init_image=images[0], strength=strength)


def _checked_object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InvalidRequest("The body is no object.", field="body", allowed="a JSON object")
    return body


def _asked(body: dict[str, Any], **start: Any) -> Asked:
    _refuse_what_is_not_built(body, _NOT_BUILT)
    settings = _object(body, "override_settings")
    _refuse_what_is_not_built(settings, _SETTINGS_NOT_BUILT, "override_settings.")
    prompt, loras = _prompt_and_loras(_text(body, "prompt"))
    batch_size, batches = _count(body, "batch_size"), _count(body, "n_iter")
    if batch_size * batches > LARGEST_NUM_IMAGES:
        raise InvalidRequest(
            "Too many pictures: batch_size times n_iter.",
            field="n_iter" if batches > 1 else "batch_size",
            value=batches if batches > 1 else batch_size,
            allowed=f"at most {LARGEST_NUM_IMAGES} pictures a request",
        )
    sampler = body.get("sampler_name") or body.get("sampler_index")
    scheduler = body.get("scheduler")
    fields = {
        "prompt": prompt,
        "negative_prompt": _text(body, "negative_prompt"),
        "width": body.get("width"),
        "height": body.get("height"),
        "num_inference_steps": body.get("steps"),
        "guidance_scale": _number(body.get("cfg_scale")),
        "seed": None if body.get("seed") in (None, -1, "") else body["seed"],
        "num_images": batch_size * batches,
        "loras": loras,
        "model": _model(settings),
        "sampler": None if not sampler else sampler_named(str(sampler), "sampler_name"),
        "scheduler": None if not scheduler else scheduler_named(str(scheduler), "scheduler"),
        "output_format": _format(settings),
        "preview_every": _PREVIEW_EVERY,
        **start,
    }
    request = GenerateRequest(**fields)
    warnings = _unknown(body), _unknown_settings(settings)
    return Asked(request, batch_size, body.get("send_images") is not False, sum(warnings, ()))


def _refuse_what_is_not_built(
    body: Mapping[str, Any], changes_nothing: Mapping[str, Callable[[Any], bool]], prefix: str = ""
) -> None:
    for name, is_neutral in changes_nothing.items():
        if name in body and not is_neutral(body[name]):
            raise NotSupportedYet(
                f"Field '{prefix}{name}' is not supported yet.",
                field=prefix + name,
                value=body[name],
                allowed="leave it out",
            )


def _prompt_and_loras(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """Take `<lora:name:weight>` out of a prompt."""
    loras = []
    for match in _EXTRA_NETWORK.finditer(prompt):
        kind, (name, *weights) = match[1], match[2].split(":")
        if kind != "lora":
            raise NotSupportedYet(
                f"Extra networks of kind {kind!r} are not supported yet.",
                field="prompt",
                value=match[0],
                allowed="<lora:name:weight>",
            )
        # Two weights are the text encoders' and the transformer's.
        numbers = {_weight(weight, match[0]) for weight in weights} or {1.0}
        if len(numbers) > 1:
            raise NotSupportedYet(
                "A LoRA has one weight here, for text encoders and transformer alike.",
                field="prompt",
                value=match[0],
                allowed="<lora:name:weight>",
            )
        loras.append({"name": name, "weight": numbers.pop()})
    return _EXTRA_NETWORK.sub("", prompt), loras


def _weight(text: str, tag: str) -> float:
    if _NUMBER.fullmatch(text.strip()) is None:
        raise InvalidRequest(
            f"The weight {text!r} of a LoRA is no number.",
            field="prompt",
            value=tag,
            allowed="<lora:name:weight>",
        )
    return float(text)


def _text(body: Mapping[str, Any], name: str) -> Any:
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidRequest(
            f"Field {name!r} is no text.", field=name, value=value, allowed="a string"
        )
    return value


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"Field {name!r} is no object.", field=name, value=value, allowed="a JSON object"
        )
    return value


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRequest(
            f"Field {name!r} is no count.",
            field=name,
            value=value,
            allowed=f"an integer from 1 to {LARGEST_NUM_IMAGES}",
        )
    return value


def _number(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        # The contract refuses it, by the field's name.
        return math.inf if value > 0 else -math.inf


def _model(settings: Mapping[str, Any]) -> Any:
    title = settings.get("sd_model_checkpoint")
    # The web UI's titles end in a short hash: `name.safetensors [0123abcdef]`.
    return re.sub(r" \[[0-9a-f]+\]$", "", title) if isinstance(title, str) and title else None


def _format(settings: Mapping[str, Any]) -> OutputFormat:
    value = settings.get("samples_format") or "png"
    if not isinstance(value, str) or value.lower() not in _FORMATS:
        raise InvalidRequest(
            f"There is no format {value!r}.",
            field="override_settings.samples_format",
            value=value,
            allowed="one of: " + ", ".join(_FORMATS),
        )
    return _FORMATS[value.lower()]


_SETTINGS_READ: Final = _names("sd_model_checkpoint samples_format")
_READ: Final = _names(
    """
    prompt negative_prompt width height steps cfg_scale seed batch_size n_iter override_settings
    sampler_name scheduler init_images denoising_strength
    """
)


def _unknown(body: Mapping[str, Any]) -> tuple[str, ...]:
    known = _READ | _CHANGES_NOTHING | _NOT_BUILT.keys()
    return tuple(
        f"Field {name!r} is not known and was ignored." for name in sorted(body.keys() - known)
    )


def _unknown_settings(settings: Mapping[str, Any]) -> tuple[str, ...]:
    known = _SETTINGS_READ | _SETTINGS_NOT_BUILT.keys()
    return tuple(
        f"Setting {name!r} of override_settings is not known and was ignored."
        for name in sorted(settings.keys() - known)
    )
