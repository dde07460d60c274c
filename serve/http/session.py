"""Logging a browser in: it keeps the API key in a cookie that no script can read.

The key itself and not a session of its own: every Pipeline knows it, nothing has to be kept, and
it ends when the key is revoked.
"""

# No `from __future__ import annotations` here: FastAPI reads the annotations of local functions.
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serve.errors import InvalidRequest
from serve.http.credentials import COOKIE, cookie_key, header, presented_key
from serve.http.gate import caller_of, is_known
from serve.key_ring import KeyRing
from serve.keys import is_key
from serve.tenants import Caller

_KEPT_S = 30 * 86_400


def add_session(app: FastAPI, keys: KeyRing) -> None:
    """Give the app `/v1/session`: who one is, logging in and logging out."""

    @app.get("/v1/session")
    async def who(request: Request) -> Response:
        """Return who asks, with `tenant` null where nobody is known; never 401."""
        cookie = cookie_key(request.scope)
        logged_in = cookie is not None and await keys.find(cookie) is not None
        caller = caller_of(request) if is_known(request) else None
        response = JSONResponse(_shown(caller, logged_in=logged_in))
        if cookie is not None and not logged_in:
            _forget(response, request)
        return response

    @app.post("/v1/session")
    async def log_in(request: Request) -> Response:
        """Keep the key that this request shows, as any other does, in a cookie of this browser."""
        # The gate has looked at it. A body is not read, so who has no key holds nothing up.
        caller, key = caller_of(request), presented_key(request.scope)
        if key is None or not is_key(key):
            raise InvalidRequest(
                "Logging in takes an API key.",
                field="authorization",
                allowed="Authorization: Bearer KEY, or the password of Basic",
            )
        response = JSONResponse(_shown(caller, logged_in=True))
        response.set_cookie(COOKIE, key, max_age=_KEPT_S, **_attributes(request))
        return response

    @app.delete("/v1/session")
    async def log_out(request: Request) -> Response:
        """Let this browser forget its key."""
        response = JSONResponse(_shown(None, logged_in=False))
        _forget(response, request)
        return response


def _shown(caller: Caller | None, *, logged_in: bool) -> dict[str, Any]:
    return {
        "tenant": None if caller is None else caller.tenant,
        "roles": [] if caller is None else sorted(caller.roles),
        "logged_in": logged_in,
    }


def _forget(response: Response, request: Request) -> None:
    response.delete_cookie(COOKIE, **_attributes(request))


def _attributes(request: Request) -> dict[str, Any]:
    # Behind a proxy that ends TLS only the page's own origin, which the gate has compared with
    # ours, says that browsers come by https.
    is_https = (header(request.scope, b"origin") or "").startswith("https:")
    return {
        "path": request.scope.get("root_path") or "/",
        "httponly": True,
        "samesite": "strict",
        "secure": is_https or request.url.scheme == "https",
    }
