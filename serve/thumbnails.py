"""Pictures in small."""

from __future__ import annotations

import io

from PIL import Image

_LONGEST_SIDE = 320
_QUALITY = 82


def thumbnail(picture: bytes) -> bytes:
    """Return a JPEG whose longer side has at most 320 pixels; blocks.

    Args:
        picture: A file that Kelvin made.
    """
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        # What the picture's file says of its request stays there: a page needs no copy of it.
        image.convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
