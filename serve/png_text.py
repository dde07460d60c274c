"""Text in a PNG that is finished: what programs write there to be found again.

Kelvin's own request is in each picture already; a door adds what its clients look for, without
decoding a pixel.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BEHIND_HEADER = len(_SIGNATURE) + 4 + 4 + 13 + 4  # IHDR comes first and has 13 bytes


def with_png_text(data: bytes, texts: Mapping[str, str]) -> bytes:
    """Return a PNG with text chunks, right behind its header.

    As Pillow writes them and ComfyUI and the web UI do through it: tEXt where Latin-1 holds the
    text, else iTXt, both uncompressed (PNG specification, third edition, sections 11.3.3.2 and
    11.3.3.4).

    Args:
        data: The file.
        texts: Keyword, of 1 to 79 Latin-1 characters, -> text.

    Raises:
        ValueError: It is no PNG.
    """
    if not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
        raise ValueError("this is no PNG")
    chunks = b"".join(_chunk(keyword, text) for keyword, text in texts.items())
    return data[:_BEHIND_HEADER] + chunks + data[_BEHIND_HEADER:]


def _chunk(keyword: str, text: str) -> bytes:
    name = keyword.encode("latin-1")
    try:
        kind, content = b"tEXt", name + b"\0" + text.encode("latin-1")
    except UnicodeEncodeError:
        # Not compressed (two bytes), no language, no translated keyword.
        kind, content = b"iTXt", name + b"\0\0\0\0\0" + text.encode("utf-8")
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
