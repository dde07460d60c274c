"""An error as AUTOMATIC1111's clients read it, in the web UI's names of fields."""

from __future__ import annotations

from typing import Any, Final

from serve.errors import KelvinError

_WORDS: Final = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "sampler": "sampler_name",
    "num_images": "n_iter",
    "model": "override_settings.sd_model_checkpoint",
    "output_format": "override_settings.samples_format",
    "init_image": "init_images",
    "strength": "denoising_strength",
    "loras": "prompt",
}


def web_ui_body(error: KelvinError) -> dict[str, Any]:
    """Return the body of an error: the web UI's four fields, then Kelvin's.

    The four are those of `handle_exception` in stable-diffusion-webui, modules/api/api.py.
    """
    told = error.body()["error"]
    message, field = told["message"], told["field"]
    ours, dot, rest = (field or "").partition(".")
    if ours in _WORDS:
        field = _WORDS[ours] + dot + rest
        message = message.replace(f"'{ours}", f"'{_WORDS[ours]}")
    remedy = f" Allowed: {told['allowed']}." if told["allowed"] else ""
    return {
        "error": told["type"],
        "detail": message,
        "body": "",
        "errors": message + remedy,
        "code": told["code"],
        "field": field,
        "value": told["value"],
        "allowed": told["allowed"],
    }
