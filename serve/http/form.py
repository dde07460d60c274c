"""Reading a multipart form from somebody unknown: bounded while it arrives."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.datastructures import FormData
from starlette.requests import Request

from serve.errors import InvalidRequest, UnsupportedMediaType
from serve.http.body import read_bytes

_FORM = "multipart/form-data"
# Python knows others that take hours for a body of megabytes, and that raise what nobody foresees.
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
_MOST_FILES = 16
_MOST_FIELDS = 100


async def read_form(request: Request, largest_bytes: int) -> FormData:
    """Return the body's fields and files; who gets it closes it.

    Args:
        request: Its body must not have been read.
        largest_bytes: Reading stops as soon as more has arrived.

    Raises:
        UnsupportedMediaType: It is no multipart form, or says that it is not in UTF-8.
        PayloadTooLarge: More than `largest_bytes`.
        BodyTooSlow: It takes too long to arrive.
        Overloaded: The bodies of all open calls take up too much.
        InvalidRequest: It is malformed, or has too many parts.
    """
    from python_multipart.multipart import parse_options_header
    from starlette.formparsers import MultiPartException, MultiPartParser

    content_type = request.headers.get("content-type", "")
    kind, options = parse_options_header(content_type)
    if (
        kind.decode("latin-1") != _FORM
        or options.get(b"charset", b"utf-8").lower() not in _CHARSETS
    ):
        raise UnsupportedMediaType(
            "The body is no multipart form in UTF-8.",
            field="content-type",
            value=content_type,
            allowed=_FORM,
        )
    body = await read_bytes(request, largest_bytes)

    async def whole() -> AsyncGenerator[bytes]:
        yield body
        yield b""

    parser = MultiPartParser(
        request.headers,
        whole(),
        max_files=_MOST_FILES,
        max_fields=_MOST_FIELDS,
        max_part_size=largest_bytes,
    )
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeError) as error:
        raise InvalidRequest(
            f"The form cannot be read: {error}.",
            field="body",
            value=f"{len(body)} bytes",
            allowed=f"{_FORM} with its boundary",
        ) from None
