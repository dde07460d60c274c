"""The picture that image-to-image starts from: read from what was sent, bounded, brought to size.

Who sends it is a stranger: nothing is decoded before its header has said how large it will be.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from serve.errors import InvalidRequest
from serve.models import ModelSpec
from serve.pictures import UNREADABLE, why_unreadable
from serve.requests import GenerateRequest, OutputFormat

LARGEST_FILE = 64 << 20
"""Bytes of a start image's file."""

LARGEST_PIXELS = 40_000_000
"""What a phone takes; decoded, 120 MB."""

_FORMATS: dict[str, OutputFormat] = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_WHITE_SPACE = b" \t\n\r\f\v"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that lie on their side
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")


def sent_bytes(text: str) -> bytes:
    """Return the file that base64 or a data: URI holds.

    Raises:
        InvalidRequest: It is neither; a URL of another kind is named as such.
    """
    if text.lower().startswith("data:"):
        if (header := _DATA_URI.match(text)) is None:
            raise refused("The data: URI is not in base64.", text)
        text = text[header.end() :]
    elif _SCHEME.match(text):
        raise refused("URLs are not fetched.", text)
    try:
        bare = text.encode("ascii").translate(None, _WHITE_SPACE)
        return base64.b64decode(bare, validate=True)
    except (binascii.Error, ValueError):
        raise refused("This is no base64.", text) from None


def upright_size(data: bytes) -> tuple[int, int]:
    """Return width and height in pixels as the picture is meant to be seen; decodes nothing.

    Raises:
        InvalidRequest: It is no picture, or too large a one.
    """
    with _opened(data) as image:
        width, height = image.size
        # The base class's, which reads what the header said; PNG's own would decode the pixels.
        is_turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in _TURNED
    return (height, width) if is_turned else (width, height)


def file_format(data: bytes) -> tuple[OutputFormat, tuple[int, int]]:
    """Return the format of a picture file, and its size as `upright_size`; decodes nothing.

    Raises:
        InvalidRequest: It is no picture, or too large a one.
    """
    with _opened(data) as image:
        kind = _FORMATS[str(image.format)]
    return kind, upright_size(data)


def fitted(data: bytes, width: int, height: int) -> bytes:
    """Return a PNG of width x height that the picture covers, in RGB and without metadata.

    It is scaled by Lanczos's filter, in one go, and cut off on both sides alike. A picture of this
    very size keeps its pixels.

    Raises:
        InvalidRequest: It is no picture, too large a one, or damaged.
    """
    with _opened(data) as image:
        rgb = _upright_rgb(image)
        if rgb.size != (width, height):
            rgb = ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(rgb)).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def shown_small(
    data: bytes, kind: Literal["webp", "jpeg"], quality: int, longest_side: int
) -> bytes:
    """Return a picture file in another format, no side longer than `longest_side` pixels.

    Args:
        data: A picture file from a stranger, or Kelvin's own.
        kind: The format.
        quality: 1 to 100.
        longest_side: Pixels.

    Raises:
        InvalidRequest: As `fitted`.
    """
    with _opened(data) as image:
        rgb = _upright_rgb(image)
        rgb.thumbnail((longest_side, longest_side))
        buffer = io.BytesIO()
        rgb.save(buffer, kind.upper(), quality=quality)
        return buffer.getvalue()


def _upright_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _SIXTEEN_BITS:
        # Pillow would take every value above 255 for white.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels of what `fitted` made: uint8 [height, width, 3] RGB.

    Raises:
        InvalidRequest: It is no such file.
    """
    with _opened(data) as image:
        return np.array(image.convert("RGB"))


def with_own_size(
    request: GenerateRequest, size: tuple[int, int], model: ModelSpec
) -> GenerateRequest:
    """Return a request with the size of its start image, if it gives no other.

    Args:
        request: With an init_image.
        size: Width and height of that.
        model: Whose limits the size is brought within, as far as its shape allows.
    """
    if request.width is not None or request.height is not None:
        return request
    width, height = size
    scale = max(1.0, model.smallest_side / width, model.smallest_side / height)
    scale = min(
        scale,
        model.largest_width / width,
        model.largest_height / height,
        math.sqrt(model.largest_area / (width * height)),
    )
    multiple = model.size_multiple
    sides = {
        name: max(multiple, int(scale * side + 1e-6) // multiple * multiple)
        for name, side in (("width", width), ("height", height))
    }
    return request.model_copy(update=sides)


def refused(message: str, value: object) -> InvalidRequest:
    """Return the error for a start image that cannot be used."""
    return InvalidRequest(
        message,
        field="init_image",
        value=value,
        allowed=GenerateRequest.allowed()["init_image"],
    )


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        # Pillow warns of sizes that are refused below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(_FORMATS))
        with image:
            if image.width * image.height > LARGEST_PIXELS:
                raise InvalidRequest(
                    "The start image is too large.",
                    field="init_image",
                    value=f"{image.width} x {image.height} pixels",
                    allowed=f"at most {LARGEST_PIXELS} pixels",
                )
            yield image
    except UNREADABLE as error:
        raise refused(
            f"The start image cannot be read: {why_unreadable(error)}.", f"{len(data)} bytes"
        ) from None
