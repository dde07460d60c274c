"""What clients of OpenAI's Images API send, as a GenerateRequest.

Every field of the contract is taken by its own name as well, but for those that OpenAI's names
stand for. Of OpenAI's own, some say nothing to Stable Diffusion: they are checked or ignored.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.datastructures import FormData, UploadFile

from serve.errors import InvalidRequest, NotSupportedYet
from serve.requests import GenerateRequest

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_SIZES = "auto, or WIDTHxHEIGHT in pixels, both multiples of 16: 1024x1024"
_COMPRESSIONS = "an integer from 0 to 100: the quality of jpeg and webp"
MOST_PARTIAL_IMAGES = 3
_BY_OPENAIS_NAME: Final = frozenset(
    {"num_images", "width", "height", "quality", "preview_every", "tenant"}
)
_PASSED: Final = frozenset(GenerateRequest.model_fields) - _BY_OPENAIS_NAME
_IGNORED: Final = frozenset({"user", "safety_identifier", "moderation", "style", "complexity"})
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "response_format": ("b64_json", "url"),
    "quality": ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"),
    "background": ("auto", "opaque", "transparent"),
    "input_fidelity": ("low", "high"),
}
_OTHERS: Final = frozenset({"n", "size", "output_compression", "stream", "partial_images", "lora"})
_KNOWN: Final = _PASSED | _IGNORED | _OTHERS | _CHOICES.keys()
# Fields of a form are text; of these it is the value itself, of all others it is JSON.
_TEXTS: Final = (
    frozenset(
        {
            *("prompt", "prompt_2", "prompt_3"),
            *("negative_prompt", "negative_prompt_2", "negative_prompt_3"),
            *("model", "sampler", "scheduler", "output_format", "idempotency_key", "size", "lora"),
        }
    )
    | _IGNORED
    | _CHOICES.keys()
)


@dataclass(frozen=True)
class Asked:
    """A request, and what of it only the door carries out."""

    request: GenerateRequest
    as_url: bool
    stream: bool
    partial_images: int
    size: str  # as it was asked for


def body_schema() -> dict[str, Any]:
    """Return the JSON schema of what `asked_of` takes."""
    ours = GenerateRequest.model_json_schema()
    theirs: dict[str, dict[str, Any]] = {
        "n": ours["properties"]["num_images"],
        "size": {"type": "string", "description": _SIZES},
        "output_compression": {"type": "integer", "description": _COMPRESSIONS},
        "stream": {"type": "boolean"},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": MOST_PARTIAL_IMAGES},
        "lora": {"description": "a name, an object of name and weight, or a list of either"},
        **{name: {"type": "string", "enum": list(allowed)} for name, allowed in _CHOICES.items()},
        **{name: {"type": "string", "description": "means nothing here"} for name in _IGNORED},
    }
    own = {
        name: ours["properties"][name] for name in GenerateRequest.model_fields if name in _PASSED
    }
    return {**ours, "title": "Images", "properties": {**own, **theirs}}


def edit_schema() -> dict[str, Any]:
    """Return the JSON schema of the form that `edit_of` takes."""
    schema = body_schema()
    properties = {name: each for name, each in schema["properties"].items() if name != "init_image"}
    image = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP"}
    required = [*schema["required"], "image"]
    return {**schema, "required": required, "properties": {"image": image, **properties}}


def asked_of(body: Any) -> Asked:
    """Return what the JSON body of `/v1/images/generations` asks for.

    Raises:
        InvalidRequest: A field is malformed, out of range or unknown.
        NotSupportedYet: It asks for a transparent background.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(
            "The body is no JSON object.", field="body", value=body, allowed="a JSON object"
        )
    if unknown := sorted(body.keys() - _KNOWN):
        raise InvalidRequest(
            f"Unknown field {unknown[0]!r}.",
            field=unknown[0],
            value=body[unknown[0]],
            allowed="one of: " + ", ".join(sorted(_KNOWN)),
        )
    given = {name: value for name, value in body.items() if value is not None}
    chosen = {name: _choice(name, given.get(name)) for name in _CHOICES}
    if chosen["background"] == "transparent":
        raise NotSupportedYet(
            "Transparent backgrounds are not supported yet.",
            field="background",
            value="transparent",
            allowed="auto or opaque",
        )
    partial_images = _partial_images(given.get("partial_images", 0))
    stream = given.get("stream", False)
    if not isinstance(stream, bool):
        raise InvalidRequest(
            "Field 'stream' is no boolean.", field="stream", value=stream, allowed="true or false"
        )
    if "lora" in given and "loras" in given:
        raise InvalidRequest(
            "Fields 'lora' and 'loras' say the same.",
            field="lora",
            value=given["lora"],
            allowed="one of them",
        )
    size = given.get("size", "auto")
    fields = {
        **{name: given[name] for name in _PASSED & given.keys()},
        **_sides(size),
        **({"num_images": given["n"]} if "n" in given else {}),
        **({"loras": _loras(given["lora"])} if "lora" in given else {}),
        # OpenAI's default is the best quality; so is its 100.
        "quality": _compression(given.get("output_compression", 100)),
        "preview_every": 1 if stream and partial_images else 0,
    }
    request = GenerateRequest.model_validate({"prompt": "", **fields})
    return Asked(request, chosen["response_format"] == "url", stream, partial_images, size)


async def edit_of(form: FormData) -> Any:
    """Return the form of `/v1/images/edits` as a body for `asked_of`.

    Raises:
        InvalidRequest: There is no image, or a field comes twice.
        NotSupportedYet: A mask, or several images.
    """
    fields: dict[str, Any] = {}
    images: list[bytes] = []
    for name, value in form.multi_items():
        plain = name.removesuffix("[]")
        if plain == "mask":
            raise NotSupportedYet(
                "Masks are not supported yet.",
                field="mask",
                value=getattr(value, "filename", None),
                allowed="no mask: the whole picture is made anew from the image",
            )
        if plain == "image" and isinstance(value, UploadFile):
            images.append(await value.read())
        elif isinstance(value, UploadFile) or plain in fields:
            raise InvalidRequest(
                f"Field {plain!r} is a file or comes twice.",
                field=plain,
                value=getattr(value, "filename", value),
                allowed="once, as text; files are image only",
            )
        else:
            fields[plain] = value if plain in _TEXTS else _json_or_text(value)
    if len(images) > 1:
        raise NotSupportedYet(
            "Several images are not supported yet.",
            field="image",
            value=f"{len(images)} images",
            allowed="one image",
        )
    if not images or "init_image" in fields:
        raise InvalidRequest(
            "An edit takes an image.",
            field="image",
            value=None,
            allowed="one PNG, JPEG or WebP file in multipart/form-data",
        )
    return {**fields, "init_image": base64.b64encode(images[0]).decode("ascii")}


def _choice(name: str, value: Any) -> str:
    allowed = _CHOICES[name]
    if value is None:
        return allowed[0]
    if value in allowed:
        return str(value)
    raise InvalidRequest(
        f"Field {name!r} has another value.",
        field=name,
        value=value,
        allowed="one of: " + ", ".join(allowed),
    )


def _partial_images(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_PARTIAL_IMAGES:
        return value
    raise InvalidRequest(
        "Field 'partial_images' is out of range.",
        field="partial_images",
        value=value,
        allowed=f"an integer from 0 to {MOST_PARTIAL_IMAGES}",
    )


def _compression(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100:
        return max(value, 1)
    raise InvalidRequest(
        "Field 'output_compression' is out of range.",
        field="output_compression",
        value=value,
        allowed=_COMPRESSIONS,
    )


def _sides(size: Any) -> Mapping[str, int]:
    if size == "auto":
        return {}
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise InvalidRequest(
            "Field 'size' cannot be read.", field="size", value=size, allowed=_SIZES
        )
    return {"width": int(found[1]), "height": int(found[2])}


def _loras(lora: Any) -> Any:
    """Return the contract's list from a name, an object with a weight or scale, or several."""
    several = lora if isinstance(lora, list) else [lora]
    for each in several:
        if isinstance(each, dict) and {"weight", "scale"} <= each.keys():
            raise InvalidRequest(
                "Fields 'weight' and 'scale' of a LoRA say the same.",
                field="lora",
                value=each,
                allowed="one of them",
            )
    return [
        {"name": each}
        if isinstance(each, str)
        else {("weight" if name == "scale" else name): value for name, value in each.items()}
        if isinstance(each, dict)
        else each
        for each in several
    ]


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
