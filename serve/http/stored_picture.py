"""A stored picture through Kelvin, for who reaches Kelvin and not the store: browsers, mostly."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

from starlette.responses import Response

from serve.errors import JobNotFound
from serve.pictures import CONTENT_TYPES, EXTENSIONS
from serve.requests import ImageRef
from serve.thumbnails import thumbnail

if TYPE_CHECKING:
    from serve.pipeline import Pipeline


_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,5}")
# By their content they are the same for ever; that they are somebody's, caches are told.
_HEADERS: Final = {
    "Cache-Control": "private, max-age=31536000, immutable",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


async def stored_picture(pipeline: Pipeline, job_id: str, index: str, tenant: str) -> Response:
    """Return the answer that is a picture as it was stored.

    Args:
        pipeline: That knows of the job.
        job_id: The job.
        index: Of the picture in it, in digits.
        tenant: Who asks.

    Raises:
        JobNotFound: There is no such job, or it has no such picture.
        StorageUnavailable: The store does not answer.
    """
    image, data = await _found(pipeline, job_id, index, tenant)
    name = f"kelvin-{job_id}-{image.index}.{EXTENSIONS[image.output_format]}"
    disposition = {"Content-Disposition": f'inline; filename="{name}"'}
    kind = CONTENT_TYPES[image.output_format]
    return Response(data, media_type=kind, headers=_HEADERS | disposition)


async def stored_thumbnail(pipeline: Pipeline, job_id: str, index: str, tenant: str) -> Response:
    """Return the answer that is a picture in small, for galleries; raises as `stored_picture`."""
    _, data = await _found(pipeline, job_id, index, tenant)
    small = await asyncio.to_thread(thumbnail, data)
    return Response(small, media_type="image/jpeg", headers=_HEADERS)


async def _found(
    pipeline: Pipeline, job_id: str, index: str, tenant: str
) -> tuple[ImageRef, bytes]:
    number = int(index) if _INDEX.fullmatch(index) else -1
    image = await pipeline.image(job_id, number, tenant)
    if image is None:
        raise JobNotFound(
            "The job has no such picture.",
            field="index",
            value=index,
            allowed="the index of one of its result's images",
        )
    return image, await pipeline.picture(image)
