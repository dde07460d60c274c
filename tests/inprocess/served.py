"""A Pipeline behind a real HTTP server in this process, for clients that open their own sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from serve.http.native import build_app
from serve.pipeline import Pipeline

_ENDS_WITHIN_S = 5


@dataclass
class Served:
    """Where it listens, and the loop on which the Pipeline and its stand-ins live."""

    url: str
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], object]) -> None:
        """Call something on the server's loop: what wakes tasks there must be called there."""
        self.loop.call_soon_threadsafe(function)


@contextmanager
def served(pipeline: Pipeline) -> Iterator[Served]:
    """Serve a Pipeline on a free port of loopback until the block is left."""
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(
        build_app(pipeline),
        log_level="warning",
        lifespan="off",
        # Whoever listens still when the tests are over is not waited for.
        timeout_graceful_shutdown=_ENDS_WITHIN_S,
    )
    server = uvicorn.Server(config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(server.serve([listening])), name="served"
    )
    thread.start()
    try:
        yield Served(url, loop)
    finally:
        server.should_exit = True
        thread.join(30)
        loop.close()
        listening.close()
