"""What tests of ComfyUI's door send and hear."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import websockets.sync.client
from PIL import Image

WORKFLOWS = Path(__file__).parents[2] / "workflows"
ENDS_WITHIN_S = 20.0


def workflow(name: str = "guide", side: int | None = 64) -> dict[str, Any]:
    """Return a workflow, its pictures of a size that the stand-in's model has."""
    graph: dict[str, Any] = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if "batch_size" in node["inputs"] and side is not None:
            node["inputs"] |= {"width": side, "height": side}
    return graph


def reduced(graph: dict[str, Any], by: int = 12) -> dict[str, Any]:
    """Return a workflow of a quarter of the steps, its pictures smaller by a factor.

    They have 64 pixels a side at least.
    """
    for node in graph.values():
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = max(2, node["inputs"]["steps"] // 4)
        for side in ("width", "height"):
            value = node["inputs"].get(side)
            if value is None:
                continue
            inputs, name = node["inputs"], side
            if isinstance(value, list):
                inputs, name = graph[value[0]]["inputs"], "value"
            if inputs[name] >= 512:  # both may be one primitive
                inputs[name] = max(64, inputs[name] // by // 16 * 16)
    return graph


def until(answer: Callable[[], Any], within_s: float = ENDS_WITHIN_S) -> Any:
    """Return the first answer that is not empty."""
    deadline = time.monotonic() + within_s
    while not (found := answer()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def history(http: httpx.Client, prompt_id: str, within_s: float = ENDS_WITHIN_S) -> Any:
    return until(lambda: http.get(f"/history/{prompt_id}").json(), within_s)[prompt_id]


def sent(http: httpx.Client, graph: Any, **more: Any) -> str:
    answer = http.post("/prompt", json={"prompt": graph, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["prompt_id"])


def received(
    url: str,
    client: str,
    graph: Any,
    http: httpx.Client,
    on_preview: Callable[[], Any] = lambda: None,
    **more: Any,
) -> list[Any]:
    """Return all that a client's websocket hears of one prompt, and of the queue after it."""
    address = f"{url.replace('http', 'ws', 1)}/ws?clientId={client}"
    heard: list[Any] = []
    with websockets.sync.client.connect(address, open_timeout=ENDS_WITHIN_S) as socket:
        heard.append(json.loads(socket.recv(ENDS_WITHIN_S)))
        prompt_id = sent(http, graph, client_id=client, **more)
        while heard[-1] != end(prompt_id):
            message = socket.recv(ENDS_WITHIN_S)
            heard.append(message if isinstance(message, bytes) else json.loads(message))
            if isinstance(message, bytes):
                on_preview()
        # How many are left is told last.
        heard.append(json.loads(socket.recv(ENDS_WITHIN_S)))
    return heard


def end(prompt_id: str) -> dict[str, Any]:
    return {"type": "executing", "data": {"node": None, "prompt_id": prompt_id}}


def png(side: int = 32, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def uploaded(http: httpx.Client, name: str, data: bytes, **form: str) -> Any:
    answer = http.post("/upload/image", files={"image": (name, data)}, data=form)
    assert answer.status_code == 200, answer.text
    return answer.json()
