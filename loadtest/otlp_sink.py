"""Where OTLP over HTTP is sent to on loopback: whatever comes is handed on as it came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

TRACES: Final = "/v1/traces"
METRICS: Final = "/v1/metrics"


@contextmanager
def otlp_sink(take: Callable[[str, bytes, str | None], None]) -> Iterator[str]:
    """Run one on a free port; gives its endpoint.

    Args:
        take: Is called, on a thread of each connection, with the path, the body as it came and its
            `Content-Encoding`, of traces and metrics alone; all else is not found.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # an exporter keeps its connection

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            is_known = self.path in (TRACES, METRICS)
            if is_known:
                take(self.path, body, self.headers.get("Content-Encoding"))
            self.send_response(200 if is_known else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
