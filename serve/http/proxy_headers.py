"""Headers that Ray Serve's proxy would choke on are taken out before it reads them.

It decodes some by itself, as UTF-8, and answers a bare 500 where they are none: before any Kelvin
has seen the request. Serve asks `middlewares` for what stands in front of its proxies, where
`ENVIRONMENT` was set when Ray started.

A websocket's handshake with a line of more than 8 KiB, a long `clientId` say, gets no answer at
all: websockets makes one, and uvicorn 0.54 does not send it. So the lines may be longer, and what
is wrong with them is told by whoever reads them.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

import ray
from starlette.middleware import Middleware

from serve import span_sender
from serve.log_ids import add_trace_ids

ENVIRONMENT: Final = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.http.proxy_headers:middlewares",
    # Serve gives a proxy five seconds to come up and then kills it, which on a busy machine goes on
    # until the start has failed.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
# websockets reads it when uvicorn first needs it, which is after a proxy asks for `middlewares`.
_LONGEST_LINE: Final = ("WEBSOCKETS_MAX_LINE_LENGTH", str(1 << 20))  # bytes
_READ_BY_THE_PROXY: Final = (b"request_id", b"multiplexed_model_id", b"session_id")


class ReadableHeaders:
    """ASGI middleware: a request goes on without those headers of Serve's that are no UTF-8.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Take them out."""
        if "headers" in scope:
            headers = [pair for pair in scope["headers"] if _is_readable(*pair)]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return what stands in front of Serve's proxies."""
    os.environ.setdefault(*_LONGEST_LINE)
    from serve.http.early_refusal import EarlyRefusal
    from serve.http.traced import Traced

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "local"
    span_sender.trace_this_process({"service.instance.id": f"proxy-{node}"})
    add_trace_ids()
    # The last one is the first to see a request. What is refused early is a number in the metrics:
    # under overload its spans would be most of all there are.
    return [
        Middleware(Traced, is_proxy=True),
        Middleware(EarlyRefusal),
        Middleware(ReadableHeaders),
    ]


def _is_readable(name: bytes, value: bytes) -> bool:
    if not name.lower().replace(b"-", b"_").endswith(_READ_BY_THE_PROXY):
        return True
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
