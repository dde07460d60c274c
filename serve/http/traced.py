"""The span of a request as the front door sees it, below the client's or below Ray Serve's proxy.

Serve's proxy takes up the client's `traceparent`; where none stands in front, this does. What is
polled by probes and pages has no span of its own.
"""

from __future__ import annotations

from typing import Any, Final

from opentelemetry.trace import SpanKind, Status, StatusCode

from serve import telemetry
from serve.http.credentials import header
from serve.http.error_shapes import inner_path
from serve.http.gate import ADMIN, PUBLIC, App, Message, Receive, Send

_NOT_TRACED: Final = PUBLIC | ADMIN
_SERVER_ERRORS = 500


class Traced:
    """ASGI middleware, next to the routes: a route's template names the span, not what is asked.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on, in a span."""
        if scope["type"] != "http" or inner_path(scope) in _NOT_TRACED:
            await self._app(scope, receive, send)
            return
        parent = header(scope, b"traceparent") if telemetry.traceparent() is None else None
        method = scope["method"]
        about: dict[str, telemetry.Attribute] = {"http.request.method": method}
        with telemetry.span(method, about, parent=parent, kind=SpanKind.SERVER) as span:

            async def answered(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= _SERVER_ERRORS:
                        span.set_attribute("error.type", str(message["status"]))
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            try:
                await self._app(scope, receive, answered)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)
