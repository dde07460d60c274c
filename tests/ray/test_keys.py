"""The gate as it stands behind Ray Serve's proxy: connections and headers arrive as they came."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from serve.client import Kelvin
from serve.errors import Unauthenticated
from serve.key_store import ObjectKeys
from serve.keys import new_key
from serve.requests import GenerateRequest
from serve.storage import ObjectStore
from tests.ray.world import FAST, World, wait_until


def test_who_comes_through_a_proxy_needs_a_key_and_no_page_elsewhere_gets_in(world: World) -> None:
    # On loopback, so it is a proxy's header that makes them strangers.
    stranger = {"x-forwarded-for": "203.0.113.7"}
    key, record = new_key("acme", ("generate",))
    store = ObjectStore(world.storage)
    keys = ObjectKeys(store)
    asyncio.run(keys.add(record))
    try:
        assert world.kelvin is not None
        url = world.kelvin.url
        with httpx.Client(base_url=url, headers=stranger, trust_env=False) as http:
            refused = http.post("/v1/generate", json=FAST)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                401,
                "unauthenticated",
            )
            wait_until(lambda: http.get(f"/k/{key}/v1/models").status_code == 200, 10)
            assert (
                http.get("/v1/status", headers={"authorization": f"Bearer {key}"}).status_code
                == 403
            )
            for foreign in ({"origin": "https://evil.example"}, {"host": "evil.example:8000"}):
                answer = world.http.post("/v1/jobs", json=FAST, headers=foreign)
                assert answer.json()["error"]["code"] == "foreign_origin"
                assert answer.status_code == 403
            with Kelvin(url, api_key=key) as client:
                made = client.generate(GenerateRequest(**FAST))
                assert client.download(made.images[0])
                asyncio.run(keys.remove(record.digest))
                wait_until(lambda: http.get(f"/k/{key}/v1/models").status_code == 401, 10)
                with pytest.raises(Unauthenticated):
                    client.job(made.id)
    finally:
        asyncio.run(keys.remove(record.digest))
        store.close()
