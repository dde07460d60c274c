"""Previews of `kelvin generate --preview-every`: the newest one of each picture, in a file.

A file that is replaced while steps go on is what image viewers and editors reload by themselves.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import InvalidRequest

if TYPE_CHECKING:
    from serve.requests import JobEvent


class PreviewFiles:
    """Writes `out.preview.jpg` beside `out.png`; `out-1.preview.jpg` where pictures are several.

    Args:
        output: The picture's own file; files are named after the job if None.
        count: Pictures of the request.
    """

    def __init__(self, output: Path | None, count: int) -> None:
        self.output = output
        self.count = count

    def save(self, event: JobEvent) -> None:
        """Write an event's preview, if it has one; whole or not at all.

        Raises:
            InvalidRequest: The file cannot be written.
        """
        if event.preview is None:
            return
        base = self.output or Path(f"kelvin-{event.id}")
        number = "" if self.count == 1 else f"-{event.image or 0}"
        file = base.with_name(f"{base.stem}{number}.preview.jpg")
        partial = file.with_suffix(".partial")
        try:
            partial.write_bytes(base64.b64decode(event.preview, validate=True))
            os.replace(partial, file)
        except binascii.Error:
            return  # no picture is worse for an unreadable preview
        except OSError as error:
            raise InvalidRequest(
                f"The preview cannot be written: {error.strerror}.",
                field="preview_every",
                value=str(file),
                allowed="a folder that can be written to",
            ) from error
