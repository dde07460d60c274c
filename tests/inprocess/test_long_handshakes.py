"""A websocket's handshake with a long line, as Serve's proxies take it, is answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import websockets.exceptions
import websockets.sync.client

# As Serve starts a proxy: it asks for what stands in front, and then lets uvicorn run.
PROXY = """
import socket

import uvicorn
from ray.serve._private import proxy
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import WebSocketRoute

from serve.http.proxy_headers import middlewares

async def refuse(websocket):
    asked = len(websocket.query_params["clientId"])
    await websocket.send_denial_response(JSONResponse({"asked": asked}, 400))

app = Starlette(routes=[WebSocketRoute("/ws", refuse)], middleware=middlewares())
listening = socket.socket()
listening.bind(("127.0.0.1", 0))
listening.listen()
print(listening.getsockname()[1], flush=True)
config = uvicorn.Config(app, lifespan="off", log_level="critical")
uvicorn.Server(config).run(sockets=[listening])
"""


def test_a_client_id_far_too_long_reaches_who_refuses_it():
    length, environment = 100_000, os.environ.copy()
    environment.pop("WEBSOCKETS_MAX_LINE_LENGTH", None)
    with subprocess.Popen(
        [sys.executable, "-c", PROXY],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=environment,
        text=True,
    ) as proxy:
        try:
            assert proxy.stdout is not None
            address = f"ws://127.0.0.1:{int(proxy.stdout.readline())}/ws?clientId={'a' * length}"
            with (
                pytest.raises(websockets.exceptions.InvalidStatus) as caught,
                websockets.sync.client.connect(address, open_timeout=20.0),
            ):
                pass
        finally:
            proxy.kill()
    assert caught.value.response.status_code == 400
    assert json.loads(caught.value.response.body) == {"asked": length}
