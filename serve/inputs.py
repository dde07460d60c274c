"""Start images in the object store: what callers send, and what each job keeps of it.

    images/{id}/input.png                   what a job starts from, brought to its size; beside its
    images/{tenant}/{id}/input.png          pictures, and it goes when they go
    uploads/{tenant}/{sha256}.{ext}         sent beforehand, as it came; `serve.sweep` removes old
                                            ones, and no job depends on one

A job's own is written before the job is accepted, so whoever takes the job over finds it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from serve.errors import InvalidRequest, StageFailed, StorageUnavailable
from serve.init_image import LARGEST_FILE, file_format, fitted, pixels_of, refused, sent_bytes
from serve.job_ids import checked, is_job_id
from serve.pictures import CONTENT_TYPES, EXTENSIONS
from serve.requests import Upload
from serve.storage import ObjectStore
from serve.tenants import checked_tenant, pictures_prefix

INPUT_FILE = "input.png"
UPLOADS = "uploads/"

# Decoded, each takes 120 MB at most, and as much again for what comes of it.
_DECODED_AT_ONCE = 2
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 4.0


class Inputs:
    """Start images of one store of pictures. All on one event loop.

    Every method raises StorageUnavailable where the store does not answer, unless it says that it
    waits.

    Args:
        store: Of pictures.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    async def load(self, init_image: str, tenant: str) -> bytes:
        """Return the file that a request's `init_image` means, whatever is in it.

        Raises:
            InvalidRequest: It is none, or not one of this tenant's.
        """
        if not init_image.startswith("s3://"):
            return await asyncio.to_thread(sent_bytes, init_image)
        prefixes = pictures_prefix(checked_tenant(tenant)), f"{UPLOADS}{tenant}/"
        key = self._own_key(init_image, prefixes)
        if key is None:
            raise InvalidRequest(
                "This s3:// URI is not one of your own pictures or uploads.",
                field="init_image",
                value=init_image,
                allowed=" or ".join(
                    f"{self._store.s3_uri(prefix.rstrip('/'))}/" for prefix in prefixes
                ),
            )
        listed = [each for each in await self._store.list_entries(key) if each.key == key]
        if listed and listed[0].size > LARGEST_FILE:
            raise refused("The start image's file is too large.", f"{listed[0].size} bytes")
        data = await self._store.get(key) if listed else None
        if data is None:
            raise refused("There is no such picture (any more).", init_image)
        return data

    def uri(self, job_id: str, tenant: str) -> str:
        """Return what `init_image` of a job's resolved request says."""
        return self._store.s3_uri(_key(job_id, tenant))

    async def keep(self, job_id: str, tenant: str, data: bytes, width: int, height: int) -> None:
        """Write down what a job starts from; once this returns, no crash loses it.

        Args:
            job_id: The job.
            tenant: Whose it is.
            data: A picture file from a stranger.
            width: Of the pictures to be made.
            height: Of them.

        Raises:
            InvalidRequest: It is no picture, or damaged.
        """
        async with self._decoding:
            made = await asyncio.to_thread(fitted, data, width, height)
        # The same job may be accepted twice at a time, under one idempotency key.
        await self._store.put(_key(job_id, tenant), made, CONTENT_TYPES["png"], if_absent=True)

    async def pixels(self, init_image: str) -> NDArray[np.uint8]:
        """Return what a job starts from; waits for a store that does not answer.

        Args:
            init_image: Of its resolved request.

        Returns:
            uint8 [height, width, 3] RGB.

        Raises:
            StageFailed: It has gone from the store.
        """
        key = self._store.key_of(init_image)
        data = None if key is None else await self._awaited(key)
        if data is None:
            raise StageFailed(
                "The job's start image has gone from the store.",
                field="init_image",
                value=init_image,
                allowed="sending the request again, with its picture",
            )
        return await asyncio.to_thread(pixels_of, data)

    async def upload(self, data: bytes, tenant: str) -> Upload:
        """Keep a picture for requests to come.

        Args:
            data: A picture file from a stranger.
            tenant: Whose it is.

        Raises:
            InvalidRequest: It is no picture, or too large a one.
        """
        kind, (width, height) = await asyncio.to_thread(file_format, data)
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"{UPLOADS}{checked_tenant(tenant)}/{sha256}.{EXTENSIONS[kind]}"
        await self._store.put(key, data, CONTENT_TYPES[kind])
        return Upload(
            init_image=self._store.s3_uri(key),
            sha256=sha256,
            size_bytes=len(data),
            width=width,
            height=height,
        )

    async def _awaited(self, key: str) -> bytes | None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._store.get(key)
            except StorageUnavailable:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _own_key(self, uri: str, prefixes: Iterable[str]) -> str | None:
        """Return the key of an URI if what lies there is a picture below one of a tenant's."""
        key = self._store.key_of(uri)
        if key is None or not key.isprintable() or {"", ".", ".."} & set(key.split("/")):
            return None
        for prefix in prefixes:
            if key.startswith(prefix):
                # The default tenant's pictures lie beside the folders of others.
                is_job = is_job_id(key.removeprefix(prefix).split("/")[0])
                return key if is_job or prefix.startswith(UPLOADS) else None
        return None


def _key(job_id: str, tenant: str) -> str:
    return f"{pictures_prefix(tenant)}{checked(job_id)}/{INPUT_FILE}"
