"""Pictures as they are when they have been made and are not yet in the store."""

from __future__ import annotations

import hashlib

from serve.requests import ImageRef
from serve.spool import MadePicture


def made(data: bytes, index: int = 0) -> MadePicture:
    sha256 = hashlib.sha256(data).hexdigest()
    ref = ImageRef(
        index=index,
        s3_uri=f"s3://kelvin/images/{index}-{sha256}.png",
        url="",
        sha256=sha256,
        size_bytes=len(data),
        width=16,
        height=16,
        output_format="png",
        seed=0,
    )
    return MadePicture(ref=ref, reports=(), joules=None)
