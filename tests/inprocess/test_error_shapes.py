"""Whoever notices an error, its body is that of the door at which it happened."""

from __future__ import annotations

import httpx
import pytest

from serve.http.native import build_app
from serve.keys import new_key
from serve.pipeline import Pipeline

WRONG_KEY = new_key("acme", ("generate",))[0]
WEB_UI = {"error", "detail", "body", "errors", "code", "field", "value", "allowed"}


@pytest.mark.parametrize(
    ("path", "headers"),
    [("/sdapi/v1/nothing", {}), ("/sdapi/v1/txt2img", {"authorization": f"Bearer {WRONG_KEY}"})],
    ids=["router", "gate"],
)
async def test_the_web_uis_clients_find_errors_where_they_look(pipeline: Pipeline, path, headers):
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        door = await http.post(path, headers=headers)
        own = await http.post(f"/k/x{path}", headers=headers)
        native = await http.post("/v1/nothing", headers=headers)
    assert door.status_code in (401, 404)
    assert door.json().keys() == own.json().keys() == WEB_UI
    assert native.json()["error"].keys() == WEB_UI - {"error", "detail", "body", "errors"} | {
        "type",
        "message",
    }
