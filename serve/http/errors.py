"""Every failure over HTTP answers with its door's one body, whoever noticed it."""

from __future__ import annotations

import logging
import math
from collections.abc import MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    KelvinError,
    Overloaded,
    RecordUnreadable,
    StageFailed,
)
from serve.http.error_shapes import error_body
from serve.keys import without_keys

_log = logging.getLogger("ray.serve")

_RETRY_AFTER_S = 2
_ALWAYS_FAILS = (StageFailed, DeadlineExceeded, RecordUnreadable)


class RouteNotFound(KelvinError):
    """No route has this path."""

    status = 404
    code = "route_not_found"


class MethodNotAllowed(KelvinError):
    """The path exists, but not with this method."""

    status = 405
    code = "method_not_allowed"


def install_error_handlers(app: FastAPI) -> None:
    """Make the app answer typed errors, unknown routes and its own bugs with one body."""
    app.add_exception_handler(KelvinError, _typed)
    app.add_exception_handler(HTTPException, _routing)
    app.add_exception_handler(RequestValidationError, _parameters)
    app.add_exception_handler(Exception, _unforeseen)
    app.router.default = _no_route


def error_response(error: KelvinError, scope: MutableMapping[str, Any]) -> JSONResponse:
    """Return the response that a typed error stands for.

    Args:
        error: Any.
        scope: ASGI's, of the request that failed.
    """
    headers: dict[str, str] = {}
    if error.status == 503 or isinstance(error, Overloaded):
        known_s = error.retry_after_s
        headers["Retry-After"] = str(_RETRY_AFTER_S if known_s is None else math.ceil(known_s))
    if error.status == 409 or isinstance(error, _ALWAYS_FAILS):
        # Who tries whatever is 409 or 5xx again, as OpenAI's clients do, obeys this.
        headers["x-should-retry"] = "false"
    if error.status in (408, 413):
        # What is left of the body is not read, so the connection cannot be used again.
        headers["Connection"] = "close"
    return JSONResponse(error_body(error, scope), status_code=error.status, headers=headers)


async def _no_route(scope: Any, receive: Any, send: Any) -> None:
    # Of websockets too, which the router's own default would answer with a bare 403.
    raise HTTPException(status_code=404)


async def _typed(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, KelvinError):
        return error_response(error, request.scope)
    return await _unforeseen(request, error)


async def _parameters(request: Request, error: Exception) -> JSONResponse:
    """Answer for a parameter that FastAPI refused by itself."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    name = ".".join(str(part) for part in first.get("loc", ())[1:])
    refused = InvalidRequest(
        f"Parameter {name!r}: {first.get('msg', 'it cannot be read')}.",
        field=name,
        value=first.get("input"),
        allowed="see /openapi.json",
    )
    return error_response(refused, request.scope)


async def _routing(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        allow = (getattr(error, "headers", None) or {}).get("Allow", "")
        response = error_response(
            MethodNotAllowed(
                f"{without_keys(request.url.path)} does not take {request.method}.",
                field="method",
                value=request.method,
                allowed=allow or "see /openapi.json",
            ),
            request.scope,
        )
        if allow:
            response.headers["Allow"] = allow
        return response
    if status == 404:
        return error_response(
            RouteNotFound(
                "There is no such route.",
                field="path",
                value=without_keys(request.url.path),
                allowed="see /openapi.json",
            ),
            request.scope,
        )
    unnamed = KelvinError(f"The request could not be taken: HTTP {status}.")
    response = error_response(unnamed, request.scope)
    response.status_code = status
    return response


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    path = without_keys(request.url.path)
    _log.error("%s %s failed", request.method, path, exc_info=error)
    error = KelvinError("Internal error; the server's log has the details.")
    return error_response(error, request.scope)
