"""One of the two services that `loadtest.telemetry_overhead` compares, and the collector for it.

A process each: telemetry is set up before Ray starts, and a process has one Ray.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serve.config import load_settings
from serve.local import LocalKelvin


class Collector:
    """Takes OTLP over HTTP and throws it away; what it costs is not Kelvin's."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.messages = 0
        self.bytes = 0


@contextmanager
def collector() -> Iterator[Collector]:
    """Run one on a free port of loopback."""
    running = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            self.rfile.read(size)
            running.messages += 1
            running.bytes += size
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve until standard input ends; the first line of standard output says where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--otlp-endpoint")
    options = parser.parse_args()
    settings = load_settings(
        overrides={
            "model": {"path": options.model},
            "http": {"port": 0},
            "embedded_store": {"data_dir": options.data_dir},
            "telemetry": {"otlp_endpoint": options.otlp_endpoint},
        }
    )
    with LocalKelvin(settings) as kelvin:
        print(json.dumps({"url": kelvin.url}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
