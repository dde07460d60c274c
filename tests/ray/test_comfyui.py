"""ComfyUI's door through Ray Serve's proxy: its websocket, whichever Pipeline a client meets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import websockets.exceptions
import websockets.sync.client
from comfy_toolkit import ComfyClient

from serve.keys import new_key
from tests.ray.world import World

GUIDE = Path(__file__).parents[1] / "workflows" / "guide.json"


def test_a_websocket_through_rays_proxy_tells_of_steps(world: World):
    graph = json.loads(GUIDE.read_text(encoding="utf-8"))
    graph["4"]["inputs"] |= {"width": 64, "height": 64}
    graph["5"]["inputs"]["steps"] = 4
    client = ComfyClient(str(world.http.base_url))
    steps: list[tuple[int, int]] = []
    result = client.submit_and_track(
        graph, on_progress=lambda step, of: steps.append((step, of)), overall_timeout=60
    )
    assert steps[-1:] == [(4, 4)]
    assert client.download(result["images"][0]).startswith(b"\x89PNG")


def test_a_refused_websocket_is_told_why_through_rays_proxy(world: World):
    wrong, _ = new_key("acme", ("generate",))
    address = str(world.http.base_url.copy_with(scheme="ws", path=f"/k/{wrong}/ws"))
    with (
        pytest.raises(websockets.exceptions.InvalidStatus) as caught,
        websockets.sync.client.connect(address),
    ):
        pass
    assert caught.value.response.status_code == 401
    assert json.loads(caught.value.response.body)["error"]["type"] == "unauthenticated"
