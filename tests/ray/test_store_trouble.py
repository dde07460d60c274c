"""The object store is missing, refuses us or is gone: said at start-up, and 503 while serving."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from serve.errors import StorageUnavailable
from serve.local import LocalKelvin
from serve.requests import GenerateRequest
from serve.s3_client import s3_client
from tests.ray.events import following
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


def test_credentials_that_changed_are_read_again(world: World):
    files = [world.store.data_dir / name for name in ("credentials", "s3.json")]
    world.store.stop()
    for file in files:
        file.unlink()
    # New random keys, which the running Kelvin does not have yet.
    world.store.start()
    answers = [world.http.post("/v1/generate", json=FAST)]
    wait_until(lambda: world.http.get("/readyz").status_code == 200)
    while answers[-1].status_code != 200:
        assert answers[-1].status_code == 503
        assert answers[-1].json()["error"]["type"] == "StorageUnavailable"
        assert len(answers) < 50
        answers.append(world.http.post("/v1/generate", json=FAST))
    assert answers[-1].json()["images"]


def waiting_pictures(world: World) -> int:
    return int(world.http.get("/v1/status").json()["spool"]["waiting_pictures"])


@pytest.mark.parametrize("down_s", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_a_store_that_is_down_mid_run_loses_nothing(world: World, down_s: float):
    undisturbed = world.generate(num_inference_steps=150, num_images=2)
    jobs = [world.submit(num_inference_steps=150, num_images=2) for _ in range(6)]
    with store_gone(world):
        until = time.monotonic() + down_s
        # Their pictures get finished while the store is gone; the rest of the time just passes.
        wait_until(lambda: waiting_pictures(world) == 12 and time.monotonic() > until)
        assert {world.http.get(f"/v1/jobs/{job}").json()["status"] for job in jobs} == {"running"}
        refused = world.http.post("/v1/jobs", json=FAST)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        spool = world.http.get("/v1/status").json()["spool"]
        assert 0 < spool["used_bytes"] < spool["limit_bytes"]
    for job in jobs:
        with following(world.http, job) as events:
            *_, last = events
        assert last["event"] == "stored", last
        for index in range(2):
            np.testing.assert_array_equal(
                world.pixels(last["result"], index), world.pixels(undisturbed, index)
            )
    assert waiting_pictures(world) == 0
    assert not any((world.store.data_dir.parent / "spool").rglob("*.picture"))
