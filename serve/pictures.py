"""Pixels to picture files and back to the request that made them.

Every picture carries its own resolved request as JSON, so it can be made again from itself, less
what decides when and not what: priority, deadline and previews. In PNG it is the international
text chunk `kelvin`, in JPEG and WebP the EXIF field UserComment (EXIF 2.32, section 4.6.5: eight
bytes naming the encoding, then the text).
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from serve.errors import InvalidRequest, KelvinError
from serve.requests import GenerateRequest, OutputFormat

CONTENT_TYPES: Final[dict[OutputFormat, str]] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}
EXTENSIONS: Final[dict[OutputFormat, str]] = {"png": "png", "jpeg": "jpg", "webp": "webp"}

_PNG_KEY = "kelvin"
_ASCII = b"ASCII\0\0\0"
# A JPEG segment holds at most 65,533 bytes; EXIF's own structure takes a little of that.
_LONGEST_JPEG_COMMENT = 65_000
_LARGEST_FILE = 256 << 20
_PROMPTS = (
    "prompt",
    "prompt_2",
    "prompt_3",
    "negative_prompt",
    "negative_prompt_2",
    "negative_prompt_3",
)
# Where its start image lies is nobody's business either. `strength` stays: without the start image
# it is refused, so that the picture is not taken for one made from the prompt alone.
_OF_THE_CALLER = (*_PROMPTS, "init_image")
_NOT_OF_THE_PICTURE = ("num_images", "priority", "deadline_s", "preview_every")
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    SyntaxError,
    OverflowError,
    Image.DecompressionBombError,
)
"""What Pillow's plugins raise on damaged files."""
_ALLOWED = "a PNG, JPEG or WebP picture that Kelvin made"


def encode_picture(pixels: NDArray[np.uint8], request: GenerateRequest, seed: int) -> bytes:
    """Return the file of one picture with its request inside.

    Args:
        pixels: [height, width, 3] RGB.
        request: The resolved request; its output_format, quality and embed_prompt decide.
        seed: The seed of this very picture, which the embedded request asks for.
    """
    image = Image.fromarray(pixels)
    comment = _comment(request, seed, with_prompts=request.embed_prompt)
    buffer = io.BytesIO()
    if request.output_format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(_PNG_KEY, comment)
        # Level 1 writes four times faster than the default and files are a tenth larger.
        image.save(buffer, "PNG", pnginfo=info, compress_level=1)
        return buffer.getvalue()
    if request.output_format == "jpeg" and len(comment) > _LONGEST_JPEG_COMMENT:
        comment = _comment(request, seed, with_prompts=False)
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _ASCII + comment.encode("ascii")
    image.save(buffer, request.output_format.upper(), quality=request.quality, exif=exif)
    return buffer.getvalue()


def prompts_fit(request: GenerateRequest) -> bool:
    """Return False where the prompts are too long for the metadata of this format."""
    if request.output_format != "jpeg" or not request.embed_prompt:
        return True
    comment = _comment(request, request.seed or 0, with_prompts=True)
    return len(comment) <= _LONGEST_JPEG_COMMENT


def read_request(source: str | Path | bytes, prompt: str | None = None) -> GenerateRequest:
    """Return the request that a picture carries.

    Args:
        source: Path of the picture, or its bytes.
        prompt: Used instead of the picture's own prompt; needed where that was left out.

    Raises:
        InvalidRequest: No such file, no picture, or no usable request inside.
    """
    parameters = _parameters(source)
    if prompt is not None:
        parameters["prompt"] = prompt
    if "prompt" not in parameters:
        raise _refused("The picture was saved without its prompt: give one.", source)
    try:
        return GenerateRequest.model_validate(parameters)
    except KelvinError as error:
        raise _refused(f"The picture's request is not valid: {error.message}", source) from None


def _comment(request: GenerateRequest, seed: int, *, with_prompts: bool) -> str:
    parameters = request.model_dump(exclude_defaults=True)
    for name in _NOT_OF_THE_PICTURE if with_prompts else (*_NOT_OF_THE_PICTURE, *_OF_THE_CALLER):
        parameters.pop(name, None)
    parameters["seed"] = seed
    # ASCII only: what EXIF's plain encoding takes, and the same text in every format.
    return json.dumps(parameters, ensure_ascii=True, sort_keys=True)


def _parameters(source: str | Path | bytes) -> dict[str, Any]:
    try:
        if isinstance(source, bytes):
            data = source
        else:
            with Path(source).open("rb") as file:
                data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise _refused(f"The picture cannot be read: {error.strerror}.", source) from None
    if len(data) > _LARGEST_FILE:
        raise _refused("The file is too large to be a picture of ours.", source)
    comment = _embedded(data, source)
    if comment is None:
        raise _refused("The picture carries no request.", source)
    try:
        parameters = json.loads(comment)
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise _refused("The picture's request is not a JSON object.", source)
    return parameters


def _embedded(data: bytes, source: str | Path | bytes) -> str | None:
    """Return the embedded text; the pixels are never decoded, so their claimed size is harmless."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                text = image.info.get(_PNG_KEY)
                return str(text) if isinstance(text, str) else None
            raw = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except UNREADABLE as error:
        reason = why_unreadable(error)
        raise _refused(f"The file is not a readable picture: {reason}.", source) from None
    if not isinstance(raw, bytes) or not raw.startswith(_ASCII):
        return None
    return raw[len(_ASCII) :].decode("ascii", "replace")


def why_unreadable(error: Exception) -> str:
    """Return what one of `UNREADABLE` says."""
    # An unknown format is named by the object it was read from, which says nothing to anybody.
    return "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)


def _refused(message: str, source: str | Path | bytes) -> InvalidRequest:
    shown = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    return InvalidRequest(message, field="from", value=shown, allowed=_ALLOWED)
