"""A Pipeline behind the gate, keys to it, and every call that its app knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts
from starlette.routing import Route

from serve import key_ring
from serve.config import StorageSettings, load_settings
from serve.errors import KelvinError
from serve.http.error_shapes import error_body
from serve.key_store import FileKeys
from serve.keys import KeyRecord, new_key
from serve.pipeline import Pipeline
from tests.inprocess.stand_in_stages import StandIn, new_pipeline

JOB = {"prompt": "a", "seed": 5}


def needing_keys(
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    stages: StandIn | None = None,
) -> Pipeline:
    """One that listens to others, so that everybody needs a key; nothing of keys is remembered."""
    monkeypatch.setattr(key_ring, "REVOKED_WITHIN_S", 0.0)
    monkeypatch.setattr(key_ring, "_NEW_WITHIN_S", 0.0)
    return with_http(storage, monkeypatch, folder, stages=stages, host="0.0.0.0")


def with_http(
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    most_calls: int = 256,
    largest_body: int = 1 << 20,
    stages: StandIn | None = None,
    **http: Any,
) -> Pipeline:
    """Return one whose keys are in `keys.json` of a folder, as those of the fixture `keys`."""
    file = {"file": str(folder / "keys.json")}
    calls = {"max_ongoing_requests": most_calls, "max_body_bytes": largest_body}
    settings = load_settings(overrides={"http": http, "keys": file, "pipeline": calls})
    sections: dict[str, Any] = {
        name: getattr(settings, name) for name in ("http", "keys", "pipeline")
    }
    return new_pipeline(stages or StandIn(), storage, monkeypatch, **sections)


async def made(keys: FileKeys, tenant: str = "acme", *roles: Any) -> tuple[str, KeyRecord]:
    key, record = new_key(tenant, roles or ("generate",))
    await keys.add(record)
    return key, record


def client(
    app: FastAPI, key: str | None = None, peer: str = "10.1.2.3", base: str = "http://10.0.0.1"
) -> httpx.AsyncClient:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(peer, 5))
    return httpx.AsyncClient(transport=transport, base_url=base, headers=headers)


def calls(app: FastAPI, job_id: str) -> Iterator[tuple[str, str]]:
    """Yield (method, path) of all that the app has; one of a kind unknown here fails."""
    for context in iter_route_contexts(app.routes):
        kind = type(context.original_route)
        if issubclass(kind, APIWebSocketRoute):
            continue  # with a test of its own
        assert issubclass(kind, APIRoute | Route), f"{context.path}: say here how it is called"
        for method in context.methods or ():
            path = (context.path or "").replace("{job_id}", job_id).replace("{index}", "0")
            path = re.sub(r"\{(prompt_id|node_class|folder|name(:path)?)\}", "x", path)
            assert "{" not in path, f"{path}: say here what stands in its place"
            yield method, path


def is_refusal(answer: httpx.Response, status: int) -> bool:
    if answer.request.method == "HEAD":
        return answer.status_code == status
    path = re.sub("^/k/[^/]*", "", answer.request.url.path)
    told, empty = answer.json(), error_body(KelvinError(""), {"path": path})
    return answer.status_code == status and keys_of(told) == keys_of(empty)


def keys_of(body: dict[str, Any]) -> dict[str, Any]:
    return {name: set(value) if isinstance(value, dict) else None for name, value in body.items()}
