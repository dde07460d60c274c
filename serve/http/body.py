"""Reading a body from somebody unknown: bounded while it arrives; JSON then strictly."""

from __future__ import annotations

import asyncio
import json
from email.message import Message
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from serve.errors import BodyTooSlow, InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from serve.http.room import take_bytes

# Whoever sends a byte now and then would hold one of the Pipeline's places for ever.
_ARRIVES_WITHIN_S = 30.0
_JSON = "application/json, or no content type at all"
# Three bytes can be a list of some sixty, made while the event loop waits. What a request may name
# is far less; ComfyUI's largest workflows come near a million.
_MOST_VALUES = 2_000_000
_BEFORE_VALUES = (b"[", b"{", b",")


async def read_json(
    request: Request,
    largest_bytes: int,
    *,
    any_content_type: bool = False,
    if_empty: Any = None,
) -> Any:
    """Return the body as JSON.

    Args:
        request: Its body must not have been read.
        largest_bytes: Reading stops as soon as more has arrived.
        any_content_type: Take it whatever it calls itself: some clients' libraries say that all
            they post is a form. The gate alone refuses pages from elsewhere then.
        if_empty: What a body without a byte means; None: it is not JSON.

    Raises:
        UnsupportedMediaType: A content type is present and is not JSON in UTF-8.
        PayloadTooLarge: More than `largest_bytes`.
        BodyTooSlow: It takes too long to arrive.
        Overloaded: The bodies of all open calls take up too much.
        InvalidRequest: Not UTF-8, not JSON, or of millions of values.
    """
    if not any_content_type:
        _check_content_type(request.headers.get("content-type"))
    data = await read_bytes(request, largest_bytes)
    if not data and if_empty is not None:
        return if_empty
    if len(data) > _MOST_VALUES and sum(map(data.count, _BEFORE_VALUES)) > _MOST_VALUES:
        raise InvalidRequest(
            "The body has too many values.",
            field="body",
            value=f"{len(data)} bytes",
            allowed=f"a JSON object of at most {_MOST_VALUES} values",
        )
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not UTF-8: byte {error.start} cannot be decoded.",
            field="body",
            value=repr(data[error.start : error.start + 8]),
            allowed="a JSON object in UTF-8",
        ) from None
    except (ValueError, RecursionError) as error:
        # ValueError also covers integers of absurd length.
        where = (
            f"line {error.lineno}, column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise InvalidRequest(
            f"The body is not JSON: {where}.",
            field="body",
            value=data[:80].decode("utf-8", "replace"),
            allowed="a JSON object in UTF-8",
        ) from None


def repeatable(body: Any) -> Any:
    """Return what `read_json` returned as JSON can say it again: NaN becomes null.

    For doors that repeat what was sent, or keep it. ComfyUI writes NaN for nodes that always
    change.

    Raises:
        InvalidRequest: Its text cannot be encoded, or is nested so deeply that a record which holds
            it could not be read again: pydantic reads 200 levels.
    """
    try:
        text = json.dumps(body, ensure_ascii=False)
        from_json(text.encode())
        return json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            "The body has text that is no Unicode, or is nested too deeply.",
            field="body",
            allowed="a JSON object in UTF-8",
        ) from None


def _check_content_type(content_type: str | None) -> None:
    # Known clients post JSON without any content type, so its absence is no error.
    if not content_type:
        return
    message = Message()
    message["content-type"] = content_type
    kind = message.get_content_type()
    charset = (message.get_param("charset") or "utf-8") if message.get_params() else "utf-8"
    is_json = kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )
    # An unparsable type falls back to text/plain above and is refused with the rest.
    if not is_json or str(charset).lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(
            "The body's content type is not JSON in UTF-8.",
            field="content-type",
            value=content_type,
            allowed=_JSON,
        )


async def read_bytes(request: Request, largest_bytes: int) -> bytes:
    """Return the body as it is, whatever its content type.

    Args:
        request: Its body must not have been read.
        largest_bytes: Reading stops as soon as more has arrived.

    Raises:
        PayloadTooLarge: More than `largest_bytes`.
        BodyTooSlow: It takes too long to arrive.
        InvalidRequest: It ended early.
        Overloaded: The bodies of all open calls take up too much.
    """
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > largest_bytes:
        raise _too_large(int(announced[:20]), largest_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(_ARRIVES_WITHIN_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > largest_bytes:
                    raise _too_large(len(data), largest_bytes)
                take_bytes(request.scope, len(chunk))
    except TimeoutError:
        raise BodyTooSlow(
            "The body did not arrive in time.",
            field="body",
            value=len(data),
            allowed=f"all of it within {_ARRIVES_WITHIN_S:g} seconds",
        ) from None
    except ClientDisconnect:
        raise InvalidRequest("The body ended early.", field="body") from None
    return bytes(data)


def _too_large(size: int, largest_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        "The body is too large.",
        field="body",
        value=size,
        allowed=f"at most {largest_bytes} bytes",
    )
