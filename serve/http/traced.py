"""The span of a request as a proxy and the front door see it, below the client's own.

The first in line takes up the client's `traceparent` and hands on its own in the same header. That
is Serve's proxy where `serve.http.proxy_headers` stands in front of it, else the front door. Ray
Serve could trace its proxies and calls, too (two spans a call, which say what `kelvin.text` and
`kelvin.text.replica` say, and a trace of its own for every question that replicas ask each other);
that took a picture more time than all spans of Kelvin's, so it is not asked for it.

What is polled by probes and pages has no span.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from serve import spans
from serve.http.credentials import header, path_without_key
from serve.http.error_shapes import inner_path
from serve.http.standing_paths import ADMIN, PUBLIC, SERVES_OWN
from serve.span_block import Attribute

if TYPE_CHECKING:
    # Else each proxy would load what reads keys from a store.
    from serve.http.gate import App, Message, Receive, Send

_NOT_TRACED: Final = PUBLIC | ADMIN | SERVES_OWN
_SERVER_ERRORS = 500
_TRACEPARENT: Final = b"traceparent"
# What a vendor adds to a traceparent is void beside another one.
_OF_THE_CLIENT: Final = (_TRACEPARENT, b"tracestate")


class Traced:
    """ASGI middleware.

    Next to the routes the span is named by a route's template; in front of a proxy, where there are
    none, `kelvin.proxy`. What is asked, which may hold a key, it never says.

    Args:
        app: What is behind it.
        is_proxy: Whether that is a proxy.
    """

    def __init__(self, app: App, *, is_proxy: bool = False) -> None:
        self._app = app
        self._is_proxy = is_proxy

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Pass a request on, in a span."""
        if scope["type"] != "http" or path_without_key(inner_path(scope)) in _NOT_TRACED:
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        name = "kelvin.proxy" if self._is_proxy else method
        about: dict[str, Attribute] = {"http.request.method": method}
        above = header(scope, _TRACEPARENT)
        with spans.span(name, about, parent=above, kind=SpanKind.SERVER) as span:

            async def answered(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= _SERVER_ERRORS:
                        span.set_attribute("error.type", str(message["status"]))
                        span.set_status(Status(StatusCode.ERROR))
                await send(message)

            if self._is_proxy:
                await self._app(_handed_on(scope, span), receive, answered)
                return
            try:
                await self._app(scope, receive, answered)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)


def _handed_on(scope: Any, span: Span) -> Any:
    own = spans.traceparent_of(span)
    if own is None:
        return scope
    others = [pair for pair in scope["headers"] if pair[0].lower() not in _OF_THE_CLIENT]
    return {**scope, "headers": [*others, (_TRACEPARENT, own.encode())]}
