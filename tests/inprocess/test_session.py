"""A browser logs in, and the page's files and pictures reach it as they should."""

from __future__ import annotations

import hashlib
import io
from http.cookies import Morsel, SimpleCookie
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from serve.config import StorageSettings
from serve.http.credentials import COOKIE
from serve.http.native import build_app
from serve.http.page import PAGE_PATHS
from serve.key_store import FileKeys
from serve.keys import new_key
from serve.pipeline import Pipeline
from tests.inprocess.gated import needing_keys

JOB = {"prompt": "a", "seed": 5, "output_format": "jpeg"}
NOBODY: dict[str, Any] = {"tenant": None, "roles": [], "logged_in": False}


@pytest.fixture
def pipeline(storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return needing_keys(storage, monkeypatch, tmp_path)


def browser(pipeline: Pipeline, base: str = "http://10.0.0.1") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(
        build_app(pipeline), raise_app_exceptions=False, client=("10.1.2.3", 5)
    )
    headers = {"origin": base, "x-requested-with": "kelvin"}
    return httpx.AsyncClient(transport=transport, base_url=base, headers=headers)


async def log_in(http: httpx.AsyncClient, key: str, **headers: str) -> httpx.Response:
    shown = {"authorization": f"Bearer {key}", **headers}
    return await http.post("/v1/session", headers=shown)


def cookie_in(answer: httpx.Response) -> Morsel[str]:
    return SimpleCookie(answer.headers["set-cookie"])[COOKIE]


async def made(keys: FileKeys, *roles: Any) -> tuple[str, str]:
    key, record = new_key("acme", roles or ("generate",))
    await keys.add(record)
    return key, record.digest


async def test_who_logs_in_is_known_until_they_log_out(pipeline: Pipeline, keys: FileKeys):
    key, _ = await made(keys, "generate", "admin")
    known = {"tenant": "acme", "roles": ["admin", "generate"], "logged_in": True}
    async with browser(pipeline) as http:
        assert (await http.get("/v1/session")).json() == NOBODY
        answer = await log_in(http, key)
        assert answer.json() == known
        cookie = cookie_in(answer)
        assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "strict", "/")
        assert cookie["secure"] == ""
        assert (await http.get("/v1/session")).json() == known
        assert (await http.post("/v1/generate", json=JOB)).json()["images"]
        assert (await http.get("/v1/status")).status_code == 200
        assert (await http.delete("/v1/session")).json() == NOBODY
        refused = await http.get("/v1/jobs")
        assert refused.status_code == 401
        # Else the browser would ask for a password over the page.
        assert refused.headers.get_list("www-authenticate") == ['Bearer realm="kelvin"']


async def test_a_browser_that_comes_by_https_keeps_the_key_for_https(
    pipeline: Pipeline, keys: FileKeys
):
    key, _ = await made(keys)
    async with browser(pipeline) as http:
        # As behind a proxy that ends TLS.
        behind = {"host": "kelvin.example", "origin": "https://kelvin.example"}
        answer = await log_in(http, key, **behind)
        assert cookie_in(answer)["secure"] is True


async def test_a_wrong_key_logs_nobody_in(pipeline: Pipeline, keys: FileKeys):
    key, _ = await made(keys)
    async with browser(pipeline) as http:
        for wrong in (new_key("acme", ("admin",))[0], "x" * 43, "", key[:-1]):
            answer = await log_in(http, wrong)
            assert (answer.status_code, answer.headers.get("set-cookie")) == (401, None)
            # Else the browser would ask for a password over the page.
            assert answer.headers.get_list("www-authenticate") == ['Bearer realm="kelvin"']
            assert key[10:30] not in answer.text
        # A key elsewhere is none; the body is not even read.
        answer = await http.post("/v1/session", json={"key": key})
        assert (answer.status_code, answer.headers.get("set-cookie")) == (401, None)
        answer = await log_in(http, key, origin="https://evil.example")
        assert (answer.status_code, answer.headers.get("set-cookie")) == (403, None)


async def test_a_revoked_key_in_a_cookie_opens_nothing_but_the_page(
    pipeline: Pipeline, keys: FileKeys
):
    key, digest = await made(keys)
    async with browser(pipeline) as http:
        await log_in(http, key)
        await keys.remove(digest)
        for path in ("/v1/jobs", "/v1/models", "/docs"):
            answer = await http.get(path)
            assert answer.status_code == 401
            assert answer.headers.get_list("www-authenticate") == ['Bearer realm="kelvin"']
        assert (await http.get("/")).status_code == 200
        answer = await http.get("/v1/session")
        assert answer.json() == NOBODY
        assert cookie_in(answer).value == ""
        assert COOKIE not in http.cookies
        another, _ = await made(keys)
        assert (await log_in(http, another)).status_code == 200


async def test_a_cookie_is_bound_to_the_page_and_yields_to_a_key(
    pipeline: Pipeline, keys: FileKeys
):
    key, _ = await made(keys)
    async with browser(pipeline) as http:
        await log_in(http, key)
        foreign = {"origin": "https://evil.example"}
        for method, path in (("POST", "/v1/jobs"), ("DELETE", "/v1/session"), ("GET", "/v1/jobs")):
            answer = await http.request(method, path, json=JOB, headers=foreign)
            assert answer.status_code == 403, path
        wrong = {"authorization": "Bearer nothing"}
        assert (await http.get("/v1/jobs", headers=wrong)).status_code == 401


async def test_pictures_come_through_kelvin_to_their_owner(pipeline: Pipeline, keys: FileKeys):
    own, _ = await made(keys)
    async with browser(pipeline) as http:
        shown = {"authorization": f"Bearer {own}"}
        job = (await http.post("/v1/generate", json=JOB, headers=shown)).json()
        (image,) = job["images"]
        answer = await http.get(f"/v1/jobs/{job['id']}/images/0", headers=shown)
        assert hashlib.sha256(answer.content).hexdigest() == image["sha256"]
        assert answer.headers["content-type"] == "image/jpeg"
        assert answer.headers["cache-control"].startswith("private")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert f"kelvin-{job['id']}-0.jpg" in answer.headers["content-disposition"]
        small = await http.get(f"/v1/jobs/{job['id']}/images/0/thumbnail", headers=shown)
        assert small.headers["content-type"] == "image/jpeg"
        assert small.content != answer.content
        with Image.open(io.BytesIO(small.content)) as opened:
            assert opened.size == (16, 16)
        for index in ("1", "-1", "00", "x", "0%2f..", "%30"):
            answer = await http.get(f"/v1/jobs/{job['id']}/images/{index}", headers=shown)
            assert answer.status_code == (200 if index == "%30" else 404), index


async def test_the_pages_files_are_plain_and_strict(pipeline: Pipeline):
    async with browser(pipeline) as http:
        for path in PAGE_PATHS:
            answer = await http.get(path)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["referrer-policy"] == "no-referrer"
            again = await http.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            # Nothing from elsewhere, nothing inline, and nothing that takes a text for markup.
            for outside in ("https://", "http://", "//cdn", "innerHTML", "style=", "onclick="):
                text = answer.text.replace("http://www.w3.org/2000/svg", "")
                assert outside not in text, (path, outside)
        for path in ("/web/", "/web/../gate.py", "/web/%2e%2e/gate.py", "/web/nothing.js", "/web"):
            assert (await http.get(path)).status_code == 401, path
