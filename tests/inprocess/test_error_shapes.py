"""Whoever notices an error, its body is that of the door at which it happened."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from serve.errors import JobNotFound
from serve.http import comfyui
from serve.http.error_shapes import error_body
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


async def test_every_route_of_comfyuis_has_its_shape(pipeline: Pipeline):
    app = build_app(pipeline)
    contexts: Any = iter_route_contexts(app.routes)
    paths = {
        context.path
        for context in contexts
        if context.original_route.endpoint.__module__ == comfyui.__name__
    }
    assert {"/ws", "/features", "/api/prompt"} <= paths
    for path in paths:
        body = error_body(JobNotFound("No."), {"path": path})
        assert body.keys() == {"error", "node_errors"}, path


async def test_openais_client_is_told_of_an_unknown_model_in_its_shape(pipeline: Pipeline):
    transport = httpx.ASGITransport(build_app(pipeline))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        answer = await http.get("/v1/models/dall-e-2")
    assert answer.status_code == 404
    told = answer.json()["error"]
    assert (told["type"], told["param"]) == ("invalid_request_error", "model")
    assert (told["code"], told["value"]) == ("model_not_found", "dall-e-2")
