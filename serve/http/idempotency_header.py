"""The `Idempotency-Key` header is the request's field of that name."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from serve.errors import InvalidRequest

_FIELD = "idempotency_key"


def with_idempotency_key(request: Request, body: Any) -> Any:
    """Return the body with the header's key in it.

    Raises:
        InvalidRequest: There are several headers, or the body has another key.
    """
    keys = request.headers.getlist("idempotency-key")
    if not keys or not isinstance(body, dict):
        return body
    in_body = body.get(_FIELD)
    if len(keys) > 1 or in_body not in (None, keys[0]):
        raise InvalidRequest(
            "The request has several idempotency keys.",
            field=_FIELD,
            value=keys[0],
            allowed="one, as the header Idempotency-Key or as the field idempotency_key",
        )
    return body | {_FIELD: keys[0]}
