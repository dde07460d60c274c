"""ComfyUI's door through Ray Serve's proxy: its websocket, whichever Pipeline a client meets."""

from __future__ import annotations

import json
from pathlib import Path

from comfy_toolkit import ComfyClient

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
