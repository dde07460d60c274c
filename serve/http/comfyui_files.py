"""Names of pictures as ComfyUI's clients see them: a prefix, the job's id and the picture's number.

ComfyUI counts files in a folder. Here a name says itself which picture it means, so every Pipeline
finds it and none keeps a list.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from serve.errors import InvalidRequest
from serve.requests import GenerateResult

_NAME = re.compile(r"_([0-9a-f]{32})_(\d{5})_\.[a-z]+$")
_VARIABLE = re.compile(r"%(width|height|year|month|day|hour|minute|second)%")
_LONGEST_PREFIX = 200
_TYPES = {"SaveImage": "output", "PreviewImage": "temp"}
_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
TEMP_PREFIX = "ComfyUI_temp"


def checked_prefix(prefix: str, fields: Mapping[str, Any]) -> str:
    """Return a SaveImage's prefix with ComfyUI's %variables% put in (`folder_paths.py`).

    Args:
        prefix: As the workflow has it: a name, with folders before it.
        fields: Of the request, for width and height.

    Raises:
        InvalidRequest: It would leave the output folder, or is too long.
    """
    now = time.localtime()
    values = {
        "width": fields.get("width", ""),
        "height": fields.get("height", ""),
        "year": now.tm_year,
        "month": f"{now.tm_mon:02}",
        "day": f"{now.tm_mday:02}",
        "hour": f"{now.tm_hour:02}",
        "minute": f"{now.tm_min:02}",
        "second": f"{now.tm_sec:02}",
    }
    said = _VARIABLE.sub(lambda match: str(values[match[1]]), prefix).replace("\\", "/")
    parts = said.split("/")
    if ".." in parts or said.startswith("/") or not said.isprintable():
        raise InvalidRequest(
            "The prefix would leave the output folder.",
            field="filename_prefix",
            value=prefix,
            allowed="a name, or folders and a name, without '..'",
        )
    if len(said) > _LONGEST_PREFIX:
        raise InvalidRequest(
            "The prefix is too long.",
            field="filename_prefix",
            value=prefix,
            allowed=f"at most {_LONGEST_PREFIX} characters",
        )
    return (
        "/".join(part for part in parts[:-1] if part) + ("/" if len(parts) > 1 else "") + parts[-1]
    )


def shown_images(result: GenerateResult, class_type: str, prefix: str) -> list[dict[str, str]]:
    """Return what an output node says of its pictures: filename, subfolder and type."""
    subfolder, _, name = prefix.rpartition("/")
    kind = _TYPES.get(class_type)
    if kind is None:
        return []
    return [
        {
            "filename": f"{name}_{result.id}_{image.index + 1:05}_."
            f"{_EXTENSIONS[image.output_format]}",
            "subfolder": subfolder,
            "type": kind,
        }
        for image in result.images
    ]


def picture_of(filename: str) -> tuple[str, int] | None:
    """Return the job's id and the picture's index that a file name means; None: it is no such."""
    match = _NAME.search(filename)
    return None if match is None else (match[1], int(match[2]) - 1)
