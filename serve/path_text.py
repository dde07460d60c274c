"""Settings that are paths: text that cannot name a file on any machine is refused as it is read."""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

# Of Linux and macOS, in bytes: NAME_MAX and PATH_MAX.
_LONGEST_NAME = 255
_LONGEST_PATH = 4096


def _path_text(text: str) -> str:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise _no_path("holds what no file's name can") from None
    if not encoded:
        raise _no_path("is empty")
    if b"\0" in encoded:
        raise _no_path("holds a zero character")
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        raise _no_path("is longer than a file's name can be")
    return text


def _with_home(text: str) -> str:
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise _no_path("begins with the home folder of nobody on this machine") from None
    return text


def _no_path(why: str) -> PydanticCustomError:
    return PydanticCustomError("no_path", "The path {why}", {"why": why})


FileName = Annotated[str, AfterValidator(_path_text)]
"""Below a folder that is known."""

PathText = Annotated[str, AfterValidator(_path_text), AfterValidator(_with_home)]
"""Absolute, relative, or in somebody's home folder: `~/models`."""
