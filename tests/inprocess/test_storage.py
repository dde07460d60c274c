"""The S3 client against a real S3 server: SigV4, conditional writes and expiry as they are."""

import asyncio
import hashlib
import os
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.storage import ObjectStore
from serve.storage_probe import probe


async def test_put_get_exists_delete(store):
    assert await store.get("a/b.bin") is None
    assert not await store.exists("a/b.bin")
    assert await store.put("a/b.bin", b"one", "application/octet-stream")
    assert await store.put("a/b.bin", b"two", "application/octet-stream")
    assert await store.get("a/b.bin") == b"two"
    assert await store.exists("a/b.bin")
    await store.delete("a/b.bin")
    await store.delete("a/b.bin")
    assert await store.get("a/b.bin") is None


async def test_empty_object_exists(store):
    await store.put("empty", b"", "text/plain")
    assert await store.exists("empty")
    assert await store.get("empty") == b""


async def test_if_absent_writes_once(store):
    assert await store.put("once", b"first", "text/plain", if_absent=True)
    assert not await store.put("once", b"second", "text/plain", if_absent=True)
    assert await store.get("once") == b"first"


async def test_of_many_at_once_exactly_one_wins(storage):
    stores = [ObjectStore(storage) for _ in range(3)]
    for attempt in range(3):
        answers = await asyncio.gather(
            *(
                store.put(f"race-{attempt}", f"{who}".encode(), "text/plain", if_absent=True)
                for who, store in enumerate(stores * 8)
            )
        )
        assert answers.count(True) == 1
        assert await stores[0].get(f"race-{attempt}") == str(answers.index(True)).encode()


async def test_prefix_is_applied_once(s3, storage, store):
    await store.put("jobs/x", b"1", "text/plain")
    whole = ObjectStore(s3.model_copy(update={"prefix": ""}))
    assert await whole.get(storage.prefix + "jobs/x") == b"1"
    assert await store.list_keys("") == ["jobs/x"]
    assert await store.list_keys("job") == ["jobs/x"]
    assert await store.list_keys("pending/") == []
    assert store.s3_uri("jobs/x") == f"s3://kelvin/{storage.prefix}jobs/x"
    assert store.key_of(store.s3_uri("jobs/x")) == "jobs/x"
    assert store.key_of("s3://another/jobs/x") is None


async def test_lists_more_than_one_page(store):
    # S3 answers at most 1000 keys at once.
    names = [f"many/{number:04d}" for number in range(1003)]
    await asyncio.gather(*(store.put(name, b"", "text/plain") for name in names))
    assert await store.list_keys("many/") == names


async def test_presigned_url_gives_the_bytes_that_were_stored(store):
    data = os.urandom(3_000_000)
    await store.put("images/0.png", data, "image/png")
    answer = httpx.get(store.presign("images/0.png"))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert hashlib.sha256(answer.content).digest() == hashlib.sha256(data).digest()


async def test_expired_presigned_url_is_refused(store, shift_clock):
    await store.put("x", b"1", "text/plain")
    shift_clock(-1)
    assert httpx.get(store.presign("x", expiry_s=3590)).status_code == 403
    assert httpx.get(store.presign("x", expiry_s=7200)).status_code == 200


async def test_tampered_presigned_url_is_refused(store):
    await store.put("x", b"1", "text/plain")
    await store.put("y", b"2", "text/plain")
    url = store.presign("x")
    assert httpx.get(url).status_code == 200
    assert httpx.get(url.replace("/x?", "/y?")).status_code == 403
    assert httpx.get(url.replace("X-Amz-Expires=3600", "X-Amz-Expires=9600")).status_code == 403
    assert httpx.get(url.split("?")[0]).status_code == 403
    assert httpx.put(url, content=b"3").status_code == 403


async def test_presigned_url_names_the_public_endpoint(storage):
    public = storage.model_copy(update={"public_endpoint_url": "https://pictures.example.org"})
    url = ObjectStore(public).presign("images/0.png")
    assert url.startswith(f"https://pictures.example.org/kelvin/{storage.prefix}images/0.png?")


async def test_the_server_refuses_what_arrives_damaged(storage, store):
    # What `put` relies on: the server compares Content-MD5 with the bytes it got.
    with pytest.raises(ClientError, match="BadDigest"):
        store._s3().put_object(
            Bucket=storage.bucket,
            Key="damaged",
            Body=b"abc",
            ContentMD5="1B2M2Y8AsgTpgAmY7PhCfg==",
        )


async def test_put_sends_content_md5_and_no_trailer(store):
    seen: list[dict[str, Any]] = []
    store._s3().meta.events.register(
        "before-send.s3.PutObject", lambda request, **_: seen.append(dict(request.headers))
    )
    await store.put("x", b"abc", "text/plain")
    assert seen[0]["Content-MD5"] == b"kAFQmDzST7DWlj99KOF/cg=="
    assert not any("trailer" in name.lower() for name in seen[0])


async def test_own_credentials_file_is_not_shadowed(storage, store, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert await store.put("x", b"1", "text/plain")


async def test_credentials_by_the_usual_chain(storage, monkeypatch):
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", storage.credentials_file)
    assert await ObjectStore(storage.model_copy(update={"credentials_file": None})).put(
        "x", b"1", "text/plain"
    )


async def test_probe_of_a_good_store(storage, store):
    checks = await probe(store.settings)
    assert [check.name for check in checks if check.ok] == [
        "s3_reachable",
        "s3_writable",
        "s3_readable",
        "s3_conditional_put",
        "s3_conditional_replace",
        "s3_presigned_get",
        "s3_deletable",
    ]
    assert await store.list_keys("probe/") == []


async def test_a_proxy_in_the_environment_does_not_stand_before_loopback(storage, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
    checks = await probe(storage)
    assert [check.name for check in checks if not check.ok] == []


async def test_probe_does_not_mind_a_public_name_it_cannot_reach(storage):
    public = storage.model_copy(update={"public_endpoint_url": "http://127.0.0.1:9"})
    checks = await probe(public)
    assert all(check.ok for check in checks)
    assert "not verified" in {check.name: check for check in checks}["s3_presigned_get"].detail


@pytest.mark.parametrize(
    "key", ["", "/", "/a", "a/", "a//b", "../a", "a/../b", ".", "a\nb", "a\x00", "é" * 600]
)
async def test_malformed_key_is_refused(store, key):
    with pytest.raises(ValueError, match="key"):
        await store.put(key, b"", "text/plain")
    with pytest.raises(ValueError, match="key"):
        store.presign(key)


_PART = st.text("abcXYZ019-_. +&=%?#é~'", min_size=1, max_size=12).filter(
    lambda part: part not in (".", "..")
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_PART, min_size=1, max_size=3).map("/".join), st.binary(max_size=100))
async def test_any_well_formed_key_comes_back(store, key, data):
    await store.put(key, data, "application/octet-stream")
    assert await store.get(key) == data
    assert key in await store.list_keys(key[:1])
    assert store.key_of(store.s3_uri(key)) == key
    assert httpx.get(store.presign(key)).content == data
    await store.delete(key)
    assert not await store.exists(key)
