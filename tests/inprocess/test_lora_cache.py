"""LoRAs of the store come to a node whole, and stay within their bound."""

import os
from pathlib import Path

import pytest

from serve.config import StorageSettings
from serve.errors import InvalidRequest, StorageUnavailable
from serve.lora_cache import LoraCache
from serve.lora_settings import LoraSettings
from serve.s3_client import s3_client
from tests.inprocess.remote_model import change_every_piece

BYTES = 600_000  # one finds room in a MiB, two do not


@pytest.fixture
def cache(storage: StorageSettings, tmp_path: Path) -> LoraCache:
    client = s3_client(storage, storage.endpoint_url, connections=2)
    for name in ("a", "far/b"):
        key = f"{storage.prefix}loras/{name}.safetensors"
        client.put_object(Bucket=storage.bucket, Key=key, Body=name[-1].encode() * BYTES)
    settings = LoraSettings(cache_dir=str(tmp_path / "cache"))
    return LoraCache(storage, "loras/", settings.model_copy(update={"cache_mib": 1}))


def found(cache: LoraCache, name: str) -> Path:
    downloaded = cache.find(name)
    assert downloaded is not None
    return downloaded.path


def test_the_longest_unused_goes_but_never_what_was_just_used(cache: LoraCache, tmp_path: Path):
    assert cache.names() == ["a", "far/b"]
    assert cache.find("c") is None
    first = found(cache, "a")
    assert first.read_bytes() == b"a" * BYTES
    with pytest.raises(StorageUnavailable, match="in use") as refused:
        cache.find("far/b")
    assert refused.value.field == "lora.cache_dir"
    assert first.is_file()
    (record,) = (tmp_path / "cache" / "models").glob("*.json")
    os.utime(record, (0, 0))
    assert found(cache, "far/b").read_bytes() == b"b" * BYTES
    assert not first.exists()


def test_what_comes_damaged_is_never_believed(
    cache: LoraCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    change_every_piece(monkeypatch)
    with pytest.raises(StorageUnavailable, match="not what its checksum says"):
        cache.find("a")
    assert not list((tmp_path / "cache" / "files").iterdir())


def test_one_of_an_absurd_size_is_not_asked_for(
    cache: LoraCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("serve.lora_cache._MOST_BYTES", BYTES - 1)
    with pytest.raises(InvalidRequest, match="'a' has more than"):
        cache.find("a")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_told_by_its_setting(storage: StorageSettings):
    client = s3_client(storage, storage.endpoint_url, connections=2)
    key = f"{storage.prefix}loras/a.safetensors"
    client.put_object(Bucket=storage.bucket, Key=key, Body=b"a")
    cache = LoraCache(storage, "loras/", LoraSettings(cache_dir="/proc/kelvin"))
    with pytest.raises(StorageUnavailable, match="cannot be used") as refused:
        cache.find("a")
    assert (refused.value.field, refused.value.value) == ("lora.cache_dir", "/proc/kelvin")
