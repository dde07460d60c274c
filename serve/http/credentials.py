"""The API key of a request: where clients may put it, and how it is taken out.

Each source is a function of the ASGI scope. What the scope says afterwards holds no key in its
path, so nothing that comes later, logs included, can write one down.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, MutableMapping
from typing import Any, Final
from urllib.parse import quote

from starlette.requests import cookie_parser

from serve.keys import is_key

_PATH_PREFIX = "/k/"
COOKIE: Final = "kelvin_key"
"""In which a browser that has logged in keeps its key (`serve.http.session`)."""

Scope = MutableMapping[str, Any]


def presented_key(scope: Scope) -> str | None:
    """Return the key that a request shows, "" being a wrong one; None: it shows none.

    Args:
        scope: Of the request; a key in its path is taken out of it.
    """
    shown = [key for source in _SOURCES if (key := source(scope)) is not None]
    return shown[0] if shown else None


def cookie_key(scope: Scope) -> str | None:
    """Return the key in a browser's cookie; None: there is none.

    Not one of the sources of `presented_key`: a browser sends it unasked wherever it goes.
    """
    cookies = header(scope, b"cookie")
    return None if cookies is None else cookie_parser(cookies).get(COOKIE)


def header(scope: Scope, name: bytes) -> str | None:
    """Return a header's value, several joined by a comma; None: there is none.

    Args:
        scope: Of the request.
        name: Of the header, in lower case.
    """
    values = [value for key, value in scope["headers"] if key.lower() == name]
    return b",".join(values).decode("latin-1") if values else None


def path_without_key(path: str) -> str:
    """Return a path, below where the app is mounted, without the `/k/{key}` that may begin it."""
    if not path.startswith(_PATH_PREFIX):
        return path
    _, _, rest = path.removeprefix(_PATH_PREFIX).partition("/")
    # No route ends with a slash; being sent on to the one without, the client would lose its key.
    return f"/{rest.rstrip('/')}"


def _of_path(scope: Scope) -> str | None:
    """Take `/k/{key}` from the path, for clients that can set a URL but no header."""
    root = scope.get("root_path", "")
    path = scope["path"]
    inner = path.removeprefix(root)
    if not inner.startswith(_PATH_PREFIX):
        return None
    key, slash, _ = inner.removeprefix(_PATH_PREFIX).partition("/")
    scope["path"] = root + path_without_key(inner)
    if scope.get("raw_path") is not None:
        # Made anew: there the prefix and the key may be percent-encoded in any way.
        scope["raw_path"] = quote(scope["path"]).encode()
    return key if is_key(key) and slash else ""


def _of_authorization(scope: Scope) -> str | None:
    """Return a Bearer token or a Basic password, RFC 6750 and 7617; user names do not matter."""
    value = header(scope, b"authorization")
    if value is None:
        return None
    scheme, _, credentials = value.strip().partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() == "basic":
        try:
            _, _, password = base64.b64decode(credentials, validate=True).partition(b":")
            return password.decode("ascii")
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


# All are asked, so that each takes its key out; of several the first counts.
_SOURCES: Final[tuple[Callable[[Scope], str | None], ...]] = (_of_path, _of_authorization)
