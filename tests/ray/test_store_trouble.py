"""The object store is missing, refuses us or is gone: said at start-up, and 503 while serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serve.errors import StorageUnavailable
from serve.local import LocalKelvin
from serve.requests import GenerateRequest
from serve.s3_client import s3_client
from tests.ray.world import FAST, World, wait_until

IMPATIENT = {"connect_timeout_s": 0.5, "read_timeout_s": 2.0, "max_attempts": 1}


def refused_start(world: World, **storage: Any) -> StorageUnavailable:
    settings = world.settings(storage=world.storage.model_dump() | IMPATIENT | storage)
    with pytest.raises(StorageUnavailable) as caught:
        LocalKelvin(settings).start()
    return caught.value


def test_a_missing_bucket_is_said_at_start(world: World):
    error = refused_start(world, bucket="no-such-bucket")
    assert "no-such-bucket" in f"{error.message} {error.allowed}"


def test_wrong_credentials_are_said_at_start(world: World, tmp_path):
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = WRONG\naws_secret_access_key = SECRETSECRETSECRET\n"
    )
    error = refused_start(world, credentials_file=str(file))
    assert "credential" in f"{error.message} {error.allowed}".lower()
    assert "SECRETSECRETSECRET" not in str(error.body())


def test_an_unreachable_store_is_said_at_start(world: World):
    # Port 9 of loopback: discard, where nothing listens.
    error = refused_start(world, endpoint_url="http://127.0.0.1:9")
    assert "127.0.0.1:9" in f"{error.message} {error.value} {error.allowed}"


@contextmanager
def store_gone(world: World) -> Iterator[None]:
    world.store.stop()
    try:
        yield
    finally:
        world.store.start()


def test_while_the_store_is_gone_requests_get_503(world: World):
    done = world.generate()["id"]
    with store_gone(world):
        for answer in (
            world.http.post("/v1/generate", json=FAST),
            world.http.post("/v1/jobs", json=FAST),
            world.http.get(f"/v1/jobs/{done}"),
        ):
            assert answer.status_code == 503, answer.text
            error = answer.json()["error"]
            assert error["type"] == "StorageUnavailable"
            assert error["allowed"]
            assert answer.headers["retry-after"]
        with pytest.raises(StorageUnavailable):
            world.handle.generate.remote(GenerateRequest(**FAST)).result()
        ready = world.http.get("/readyz")
        assert ready.status_code == 503
        assert [check["name"] for check in ready.json()["checks"] if not check["ok"]] == ["store"]
        assert world.http.get("/healthz").status_code == 200
    wait_until(lambda: world.http.get("/readyz").status_code == 200)
    assert world.generate()["images"]
    assert world.http.get(f"/v1/jobs/{done}").json()["status"] == "succeeded"
    assert world.http.get("/v1/status").json()["pipeline"]["running_jobs"] == 0


def test_a_bucket_removed_while_serving_gets_503(world: World):
    client = s3_client(world.storage, world.storage.endpoint_url, connections=1)
    bucket = world.storage.bucket
    # SeaweedFS deletes a bucket with what is in it.
    client.delete_bucket(Bucket=bucket)
    try:
        answer = world.http.post("/v1/generate", json=FAST)
        with pytest.raises(StorageUnavailable) as caught:
            world.handle.generate.remote(GenerateRequest(**FAST)).result()
    finally:
        client.create_bucket(Bucket=bucket)
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["type"] == "StorageUnavailable"
    assert error["field"] == "storage.bucket"
    assert error["value"] == bucket
    assert error["allowed"]
    assert caught.value.body() == answer.json()
    wait_until(lambda: world.http.get("/readyz").status_code == 200)
    assert world.generate()["images"]


def test_a_store_that_refuses_us_gets_503(world: World):
    files = [world.store.data_dir / name for name in ("credentials", "s3.json")]
    kept = {file: file.read_bytes() for file in files}
    world.store.stop()
    for file in files:
        file.unlink()
    # New random keys, which the running Kelvin does not have.
    world.store.start()
    try:
        answer = world.http.post("/v1/generate", json=FAST)
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "StorageUnavailable"
    finally:
        world.store.stop()
        for file, data in kept.items():
            file.write_bytes(data)
        world.store.start()
    wait_until(lambda: world.http.get("/readyz").status_code == 200)
    assert world.generate()["images"]
