"""Pictures that ComfyUI's clients upload by name, for LoadImage to find them.

    comfyui/{tenant}/images/{base64 of folder and name}    where the upload lies, and its digest;
                                                           a long name in parts: `{part}./{rest}`

The picture itself is an upload like any other (`serve.inputs`); `serve.sweep` removes both when
they are old. A name with `[output]` or `[temp]` behind it is a picture of one's own.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.comfyui_settings import COMFYUI
from serve.errors import InvalidRequest, JobNotFound
from serve.http.comfyui_files import picture_of
from serve.tenants import checked_tenant

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

_JSON = "application/json"
_LONGEST_NAME = 255  # bytes, as of a file
_LONGEST_PART = 240  # of a key between slashes: stores on file systems take no more than 255
_NEXT_PART = "./"
_MOST_NAMESAKES = 100
_ANNOTATED = re.compile(r"^(.*\S) ?\[(input|output|temp)\]$")


class InputPicture(BaseModel):
    """An uploaded picture under its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    init_image: str
    sha256: str


class InputPictures:
    """The named pictures of one service.

    Args:
        pipeline: Whose.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def keep(
        self, name: str, subfolder: str, data: bytes, tenant: str, *, overwrite: bool
    ) -> str:
        """Keep a picture, and return the name it has: another one's is not taken from it.

        Args:
            name: That the client gave it.
            subfolder: Folders before it.
            data: The file.
            tenant: Whose.
            overwrite: Whether it may take the place of another picture.

        Raises:
            InvalidRequest: The name or the picture cannot be used.
        """
        _checked_path(f"{subfolder}/{name}" if subfolder else name)
        upload = await self._pipeline.upload(data, tenant)
        picture = InputPicture(init_image=upload.init_image, sha256=upload.sha256)
        content = picture.model_dump_json().encode()
        stem, dot, suffix = name.rpartition(".") if "." in name else (name, "", "")
        for number in range(_MOST_NAMESAKES):
            taken = f"{stem} ({number}){dot}{suffix}" if number else name
            key = _key(f"{subfolder}/{taken}" if subfolder else taken, tenant)
            store = self._pipeline.records
            if await store.put(key, content, _JSON, if_absent=not overwrite):
                return taken
            if await self._read(key) == picture:
                await store.put(key, content, _JSON)  # as young as what was sent now
                return taken
        raise InvalidRequest(
            "There are too many pictures of this name.",
            field="image",
            value=name,
            allowed="another name, or overwrite=true",
        )

    async def find(self, path: str, tenant: str) -> str | None:
        """Return the `init_image` that a LoadImage's name means; None: there is no such picture."""
        annotated = _ANNOTATED.match(path)
        bare, kind = (annotated[1], annotated[2]) if annotated else (path, "input")
        if kind != "input":
            return await self._own(bare, tenant)
        try:
            _checked_path(bare)
        except InvalidRequest:
            return None
        picture = await self._read(_key(bare, tenant))
        return None if picture is None else picture.init_image

    async def names(self, tenant: str) -> list[str]:
        """Return the names of all uploaded pictures of a tenant."""
        prefix = _key("", tenant)
        keys = await self._pipeline.records.list_keys(prefix)
        return sorted(filter(None, (_name_of(key.removeprefix(prefix)) for key in keys)))

    async def _own(self, filename: str, tenant: str) -> str | None:
        found = picture_of(filename)
        if found is None:
            return None
        try:
            image = await self._pipeline.image(*found, tenant)
        except JobNotFound:
            return None
        return None if image is None else image.s3_uri

    async def _read(self, key: str) -> InputPicture | None:
        data = await self._pipeline.records.get(key)
        try:
            return None if data is None else InputPicture.model_validate_json(data)
        except ValidationError:
            return None


def _checked_path(path: str) -> None:
    parts = path.replace("\\", "/").split("/")
    is_name = path.isprintable() and not {"", ".", ".."} & set(parts)
    # Behind a name it says which folder is meant.
    if not is_name or _ANNOTATED.match(path) or len(path.encode()) > _LONGEST_NAME:
        raise InvalidRequest(
            "A picture cannot have this name.",
            field="image",
            value=path,
            allowed=f"at most {_LONGEST_NAME} bytes: a file name, with folders in subfolder",
        )


def _key(path: str, tenant: str) -> str:
    # Names are a stranger's; none of their characters become part of a key.
    name = base64.urlsafe_b64encode(path.encode()).decode().rstrip("=")
    parts = [name[begin : begin + _LONGEST_PART] for begin in range(0, len(name), _LONGEST_PART)]
    return f"{COMFYUI}{checked_tenant(tenant)}/images/{_NEXT_PART.join(parts)}"


def _name_of(key: str) -> str | None:
    name = key.replace(_NEXT_PART, "")
    try:
        return base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
