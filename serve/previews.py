"""A step's preview as it travels to followers: a small JPEG in base64, as JSON can carry it."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_QUALITY = 85


def preview_text(pixels: NDArray[np.uint8]) -> str:
    """Return base64 of a JPEG; about 8 kB for a picture of 1024 x 1024.

    Args:
        pixels: [h, w, 3] RGB, at latent resolution.
    """
    buffer = io.BytesIO()
    # Without chroma subsampling: each of these pixels stands for 64.
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
