"""A result in AUTOMATIC1111's words: the `info` string and the parameters text of each picture.

Source: stable-diffusion-webui, modules/processing.py, `create_infotext` and `Processed.js`.
"""

from __future__ import annotations

import json
from typing import Any

from serve.http.a1111_names import SAMPLERS, SCHEDULERS
from serve.requests import GenerateRequest, GenerateResult, ImageRef


def infotext(result: GenerateResult, image: ImageRef) -> str:
    """Return the parameters text of one picture, as the web UI shows and reads it.

    Args:
        result: Its request is resolved.
        image: Of the result.
    """
    request = result.request
    facts: dict[str, Any] = {
        "Steps": request.num_inference_steps,
        "Sampler": _sampler(request),
        "Schedule type": SCHEDULERS[request.scheduler] if request.scheduler else None,
        "CFG scale": _short(request.guidance_scale),
        "Seed": image.seed,
        "Size": f"{image.width}x{image.height}",
        "Model": result.model,
        "Denoising strength": _short(request.strength),
        "Shift": _short(request.shift),
        "Version": "Kelvin",
    }
    told = ", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items() if value)
    negative = f"Negative prompt: {request.negative_prompt}\n" if request.negative_prompt else ""
    return f"{prompt_with_loras(request)}\n{negative}{told}"


def info(result: GenerateResult, batch_size: int, warnings: tuple[str, ...]) -> str:
    """Return the `info` of an answer: JSON in a string.

    Args:
        result: Its request is resolved.
        batch_size: As it was asked for.
        warnings: Of the door; the result's come behind them.
    """
    request, images = result.request, result.images
    prompt = prompt_with_loras(request)
    return json.dumps(
        {
            "prompt": prompt,
            "all_prompts": [prompt] * len(images),
            "negative_prompt": request.negative_prompt,
            "all_negative_prompts": [request.negative_prompt] * len(images),
            "seed": request.seed,
            "all_seeds": [image.seed for image in images],
            "subseed": request.seed,
            "all_subseeds": [image.seed for image in images],
            "subseed_strength": 0,
            "width": request.width,
            "height": request.height,
            "sampler_name": _sampler(request),
            "cfg_scale": request.guidance_scale,
            "steps": request.num_inference_steps,
            "batch_size": batch_size,
            "restore_faces": False,
            "face_restoration_model": None,
            "sd_model_name": result.model,
            "sd_model_hash": None,
            "sd_vae_name": None,
            "sd_vae_hash": None,
            "seed_resize_from_w": -1,
            "seed_resize_from_h": -1,
            "denoising_strength": request.strength,
            "extra_generation_params": {
                "Schedule type": SCHEDULERS[request.scheduler] if request.scheduler else None
            },
            "index_of_first_image": 0,
            "infotexts": [infotext(result, image) for image in images],
            "styles": [],
            "job_timestamp": result.id,
            "clip_skip": 1,
            "is_using_inpainting_conditioning": False,
            "version": "Kelvin",
            "warnings": [*warnings, *result.warnings],
        }
    )


def prompt_with_loras(request: GenerateRequest) -> str:
    """Return the prompt with its LoRAs written as the web UI's tags."""
    tags = [f"<lora:{lora.name}:{_short(lora.weight)}>" for lora in request.loras]
    return " ".join([request.prompt, *tags])


def _sampler(request: GenerateRequest) -> str | None:
    return SAMPLERS[request.sampler][0] if request.sampler else None


def _short(number: float | None) -> str | None:
    return None if number is None else f"{number:g}"


def _quoted(value: Any) -> str:
    # The text is read back at commas, colons and line ends (`quote` in modules/infotext_utils.py).
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(each in text for each in ",:\n") else text
