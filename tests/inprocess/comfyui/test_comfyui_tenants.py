"""No tenant sees anything of another's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets.sync.client

from serve.access_settings import HttpSettings, KeySettings
from serve.config import StorageSettings
from serve.key_store import FileKeys
from serve.keys import new_key
from tests.inprocess.comfyui.caller import (
    ENDS_WITHIN_S,
    end,
    history,
    png,
    sent,
    uploaded,
    workflow,
)
from tests.inprocess.served import served
from tests.inprocess.stand_in_stages import StandIn, new_pipeline


async def test_no_tenant_sees_anothers_prompts_or_pictures(
    stages: StandIn,
    storage: StorageSettings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    file = tmp_path / "keys.json"
    keys = {tenant: new_key(tenant, ("generate",)) for tenant in ("acme", "globex")}
    for _, record in keys.values():
        await FileKeys(file).add(record)
    sections: dict[str, Any] = {
        "http": HttpSettings(host="0.0.0.0"),
        "keys": KeySettings(file=str(file)),
    }
    with served(new_pipeline(stages, storage, monkeypatch, **sections)) as running:

        def client(tenant: str) -> httpx.Client:
            # In the path, for clients that can set a URL alone; their websockets too.
            return httpx.Client(base_url=f"{running.url}/k/{keys[tenant][0]}/", timeout=20)

        def asked() -> None:
            with client("acme") as own, client("globex") as other:
                prompt_id = sent(own, workflow(), prompt_id="p")
                entry = history(own, prompt_id)
                (image,) = entry["outputs"]["7"]["images"]
                uploaded(own, "a.png", png())
                for path in (f"/history/{prompt_id}", "/history"):
                    assert other.get(path).json() == {}
                assert other.get("/view", params=image).status_code == 404
                held = {"filename": "a.png", "type": "input"}
                assert own.get("/view", params=held).status_code == 200
                assert other.get("/view", params=held).status_code == 404
                graph = workflow("image_to_image")
                graph["4"] = graph["14"] | {"inputs": {"ckpt_name": "m.safetensors"}}
                for node in graph.values():
                    node["inputs"] |= {
                        name: ["4", link[1]]
                        for name, link in node["inputs"].items()
                        if isinstance(link, list) and link[0] == "14"
                    }
                del graph["14"]
                for name in ("a.png", f"{image['filename']} [output]"):
                    graph["10"]["inputs"]["image"] = name
                    assert own.post("/prompt", json={"prompt": graph}).status_code == 200
                    refused = other.post("/prompt", json={"prompt": graph})
                    assert list(refused.json()["node_errors"]) == ["10"]
                other.post("/history", json={"delete": [prompt_id]})
                other.post("/queue", json={"delete": [prompt_id]})
                assert own.get(f"/history/{prompt_id}").json() == {prompt_id: entry}
                # The same id is another prompt of theirs, not a conflict that tells of this one.
                changed = workflow()
                changed["5"]["inputs"]["seed"] = 2
                assert sent(other, changed, prompt_id="p") == "p"
                address = f"{running.url.replace('http', 'ws')}/k/{keys['globex'][0]}/ws"
                with websockets.sync.client.connect(f"{address}?clientId=c") as socket:
                    history(own, sent(own, workflow(), client_id="c"))
                    mine = sent(other, changed, client_id="c", prompt_id="q")
                    heard: list[Any] = []
                    while end(mine) not in heard:
                        heard.append(json.loads(socket.recv(ENDS_WITHIN_S)))
                    told = {each["data"].get("prompt_id", mine) for each in heard}
                    assert told == {mine}
            with httpx.Client(base_url=running.url) as nobody:
                refused = nobody.post("/prompt", json={"prompt": workflow()})
                assert refused.status_code == 401
                assert refused.json()["error"]["type"] == "unauthenticated"

        await asyncio.to_thread(asked)
