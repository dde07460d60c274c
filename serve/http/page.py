"""The page at `/`: plain files, the same for everybody, so they need no key.

Nothing on it comes from anywhere else, and nothing that a user wrote is ever taken for markup: the
Content-Security-Policy says so to the browser as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).parent / "web"
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # previews come within events
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Its address may hold a key: /k/KEY/.
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

_FILES: Final = {
    "/" if file.name == "index.html" else f"/web/{file.name}": file
    for file in sorted(_FOLDER.iterdir())
    if file.suffix in _TYPES
}
PAGE_PATHS: Final = frozenset(_FILES)
"""Paths of the page's files, which say nothing about anybody."""


def add_page(app: FastAPI) -> None:
    """Give the app the page's routes: one for each of its files, and no others."""
    for path, file in _FILES.items():
        app.router.add_route(path, _Sent(file).answer, methods=["GET"], include_in_schema=False)


class _Sent:
    """Answers with one file, or that the browser has it."""

    def __init__(self, file: Path) -> None:
        self._data = file.read_bytes()
        self._headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(self._data).hexdigest()[:32]}"'}
        self._type = _TYPES[file.suffix]

    async def answer(self, request: Request) -> Response:
        """Return the file, or 304."""
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._data, headers=self._headers, media_type=self._type)
