"""Web pages elsewhere get nothing done, whether the gate asks for keys or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.config import StorageSettings
from serve.http.native import build_app
from serve.job_ids import new_job_id
from serve.key_store import FileKeys
from serve.keys import new_key
from serve.pipeline import Pipeline
from tests.inprocess.gated import JOB, calls, client, is_refusal, made, needing_keys, with_http


@pytest.fixture
def pipeline(tmp_path: Path, storage: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return needing_keys(storage, monkeypatch, tmp_path)


async def test_where_no_key_is_needed_only_one_of_ours_can_be_wrong(
    storage: StorageSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    app = build_app(with_http(storage, monkeypatch, tmp_path, host="127.0.0.1"))
    ours = new_key("acme", ("generate",))[0]
    for key, status in (("sk-of-another-service", 200), ("none", 200), (ours, 401), ("", 401)):
        async with client(app, key, "127.0.0.1", "http://127.0.0.1") as http:
            assert (await http.get("/v1/models")).status_code == status
    async with client(app, "none", "10.1.2.3", "http://127.0.0.1") as http:
        assert (await http.get("/v1/models")).status_code == 401


FOREIGN: list[dict[str, str]] = [
    {"origin": "https://evil.example"},
    {"origin": "http://127.0.0.1:9000"},
    {"origin": "https://127.0.0.1:8443"},
    {"origin": "http://127.0.0.1@evil.example"},
    {"origin": "http://127.0.0.1.evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://127.0.0.1, http://evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"host": "evil.example", "origin": "http://evil.example"},  # DNS rebinding
    {"host": "evil.example"},
    {"host": "evil.example:80"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "192.168.1.7"},
    {"host": ""},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_web_page_elsewhere_cannot_post_to_loopback(
    headers: dict[str, str],
    storage: StorageSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    pipeline = with_http(storage, monkeypatch, tmp_path)
    app = build_app(pipeline)
    async with client(app, peer="127.0.0.1", base="http://127.0.0.1") as http:
        for method, path in calls(app, new_job_id()):
            if method in ("POST", "DELETE"):
                answer = await http.request(method, path, json=JOB, headers=headers)
                assert is_refusal(answer, 403), (method, path)
                assert '"foreign_origin"' in answer.text
    assert not pipeline._live


async def test_loopback_needs_no_key(
    storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    app = build_app(with_http(storage, monkeypatch, tmp_path))
    own: list[tuple[str, dict[str, str]]] = [
        ("http://127.0.0.1", {}),
        ("http://localhost:8000", {"origin": "http://localhost:8000"}),
        ("http://[::1]:8000", {"origin": "http://[::1]:8000", "sec-fetch-site": "same-origin"}),
    ]
    for base, headers in own:
        async with client(app, peer="::1", base=base) as http:
            assert (await http.post("/v1/jobs", json=JOB, headers=headers)).status_code == 202
            assert (await http.get("/v1/status")).status_code == 200
    forwarded = [
        {"x-forwarded-for": "9.9.9.9"},
        {"x-real-ip": "9.9.9.9"},
        {"forwarded": "for=9.9.9.9"},
        {"via": "1.1 x"},
    ]
    async with client(app, peer="127.0.0.1", base="http://127.0.0.1") as http:
        for headers in forwarded:
            assert is_refusal(await http.get("/v1/models", headers=headers), 401)
    async with client(app, peer="10.0.0.9", base="http://127.0.0.1") as http:
        assert is_refusal(await http.get("/v1/models"), 401)
    async with client(app, peer="127.0.0.1", base="http://10.0.0.1") as http:
        assert is_refusal(await http.get("/v1/models"), 401)


async def test_open_to_all_is_open_but_not_to_pages_elsewhere(
    storage: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    app = build_app(
        with_http(
            storage,
            monkeypatch,
            tmp_path,
            host="0.0.0.0",
            open_to_all=True,
            allowed_hosts=["Kelvin.example"],
        )
    )
    async with client(app) as http:
        for host in ("10.0.0.1:8000", "kelvin", "kelvin.example", "[fe80::1]:8000"):
            answer = await http.post("/v1/generate", json=JOB, headers={"host": host})
            assert answer.status_code == 200, host
        for headers in (
            {"host": "evil.example"},
            {"origin": "https://evil.example"},
            {"sec-fetch-site": "cross-site"},
        ):
            assert is_refusal(await http.post("/v1/jobs", json=JOB, headers=headers), 403)
        behind_a_proxy = {"host": "10.0.0.1", "origin": "https://kelvin.example"}
        answer = await http.post("/v1/generate", json=JOB, headers=behind_a_proxy)
        assert answer.status_code == 200


async def test_a_browser_with_a_key_is_bound_to_its_own_page(pipeline: Pipeline, keys: FileKeys):
    app = build_app(pipeline)
    key, _ = await made(keys)
    async with client(app) as http:
        own = {"host": "kelvin.example", "origin": "https://kelvin.example"}
        answer = await http.post("/v1/jobs", json=JOB, headers=own, auth=("x", key))
        assert answer.status_code == 202
        foreign = {"host": "kelvin.example", "origin": "https://evil.example"}
        answer = await http.post("/v1/jobs", json=JOB, headers=foreign, auth=("x", key))
        assert is_refusal(answer, 403)
