"""Is what came back the picture that was asked for? Its format, its size, and its bytes."""

from __future__ import annotations

import hashlib
import io

from PIL import Image, UnidentifiedImageError

# Now, and not in the threads in which locust's users decode: those who import the same plugin at
# once, in a process that gevent has patched, wait for each other for ever.
Image.init()

NOT_A_PICTURE, WRONG_SIZE, WRONG_BYTES = "not_a_picture", "wrong_size", "sha256_mismatch"
WRONG = (NOT_A_PICTURE, WRONG_SIZE, WRONG_BYTES)
"""What no service may answer, however great the load."""


def fault_in(picture: bytes, width: int, height: int) -> str:
    """Return what is wrong with a picture, all of which is decoded; empty: nothing.

    Args:
        picture: As it came.
        width: That was asked for, in pixels.
        height: The same.
    """
    try:
        with Image.open(io.BytesIO(picture)) as image:
            image.load()
            return "" if image.size == (width, height) else WRONG_SIZE
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return NOT_A_PICTURE


def fault_in_stored(stored: bytes, sha256: str) -> str:
    """Return what is wrong with what the store returned, given the promised SHA-256 in hex."""
    return "" if hashlib.sha256(stored).hexdigest() == sha256 else WRONG_BYTES
