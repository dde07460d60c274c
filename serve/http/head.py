"""HEAD wherever GET is: RFC 9110, section 9.1, and what monitors and download tools ask first."""

from __future__ import annotations

from typing import Any

from serve.http.gate import App, Receive, Send


class HeadAsGet:
    """ASGI middleware next to the routes, of which FastAPI's take GET alone.

    The server in front sends what GET would be answered with, without the body.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope["method"] = "GET"
        await self._app(scope, receive, send)
