"""A model in a real S3 store comes to a node once, whole, and stays within its bound."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.card_fit import refuse_what_cannot_fit
from serve.commands.model_files import check_model
from serve.config import PoolSettings, StorageSettings
from serve.errors import ConfigurationError, KelvinError, StorageUnavailable
from serve.model_cache.node_copy import on_this_node
from serve.model_dir import lora_roots, resolve_model_dir
from serve.models import ModelSpec
from tests.inprocess.remote_model import (
    PART_BYTES,
    Remote,
    change_every_piece,
    files_in,
    uploaded_pico,
)

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def remote(s3: StorageSettings, storage: StorageSettings, tmp_path: Path) -> Remote:
    return Remote(s3, f"{storage.prefix}pico", tmp_path / "cache")


@pytest.fixture
def model(remote: Remote, tmp_path: Path) -> Path:
    return uploaded_pico(remote, tmp_path / "written")


def wait_until(what: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def test_a_folder_comes_as_it_is_and_is_a_model(remote: Remote, model: Path):
    settings = remote.settings()
    folder = resolve_model_dir(settings)
    assert folder.name == "pico"
    assert files_in(folder) == files_in(model)
    assert ModelSpec.from_directory(folder).name == ModelSpec.from_directory(model).name
    assert lora_roots(settings) == [folder]


def test_doctor_and_the_fit_of_cards_read_it_and_leave_its_weights_in_the_store(
    remote: Remote, model: Path
):
    dotted = Remote(remote._s3, f"{remote.prefix}-3.5-large", remote._cache)
    for name, data in files_in(model).items():
        dotted.put(name, data)
    settings = dotted.settings()
    verdicts = {finding.name: finding for finding in check_model(settings)}
    assert verdicts["model"].verdict == "ok", verdicts["model"].detail
    assert settings.path in verdicts["model"].detail
    pool = PoolSettings(name="denoiser", num_gpus=1, accelerator_type="L4")
    refuse_what_cannot_fit([(settings, {"denoise": (pool,)})])
    assert [path.name for path in remote._cache.iterdir()] == ["described"]


def test_who_comes_later_downloads_nothing(remote: Remote, model: Path):
    first = Path(on_this_node(remote.settings()).path)
    before = {path: (first / path).stat() for path in files_in(first)}
    done = remote.elsewhere(remote.settings())
    said, log = done.communicate(timeout=60)
    assert said.strip() == str(first)
    assert "GiB came" not in log
    assert {path: (first / path).stat() for path in before} == before


def test_of_processes_that_begin_together_one_downloads(remote: Remote, model: Path):
    settings = remote.settings()
    together = [remote.elsewhere(settings) for _ in range(3)]
    told = [each.communicate(timeout=60) for each in together]
    assert len({said for said, _ in told}) == 1
    assert files_in(Path(told[0][0].strip())) == files_in(model)
    assert sum("GiB came" in log for _, log in told) == 1


def test_a_single_file_in_parts(remote: Remote):
    data = os.urandom(2 * PART_BYTES + 12_345)
    remote.put_in_parts("large.safetensors", data)
    path = Path(on_this_node(remote.settings("large.safetensors")).path)
    assert path.name == "large.safetensors"
    assert path.read_bytes() == data
    (record,) = (remote._cache / "files").glob("*.json")
    checksum = json.loads(record.read_text())["checksum"]
    assert checksum["part_bytes"] == PART_BYTES
    assert on_this_node(remote.settings("large.safetensors", verify="checksum")).path == str(path)


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone", "rotten", "of another boot"])
def test_a_damaged_file_is_downloaded_again(
    remote: Remote, model: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    settings = remote.settings(verify="checksum" if damage == "rotten" else "size")
    file = Path(on_this_node(settings).path) / WEIGHTS
    right, about = file.read_bytes(), file.stat()
    wrong = right[:-1] if damage == "truncated" else right[:-1] + bytes([right[-1] ^ 1])
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(wrong)
    if damage in ("rotten", "of another boot"):
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    if damage == "of another boot":
        monkeypatch.setattr("serve.model_cache.node_cache._boot", lambda: "the next one")
    again = Path(on_this_node(settings).path) / WEIGHTS
    assert again == file
    assert again.read_bytes() == right


@pytest.mark.parametrize("size", [1000, 2 * PART_BYTES + 1])
def test_what_comes_damaged_is_never_believed(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, size: int
):
    change_every_piece(monkeypatch)
    remote.put_in_parts("large.safetensors", os.urandom(size))
    with pytest.raises(ConfigurationError, match="not what its checksum says") as refused:
        on_this_node(remote.settings("large.safetensors"))
    assert refused.value.field == "model.path"
    assert not list((remote._cache / "files").iterdir())


def test_a_new_version_keeps_what_it_has_in_common_with_the_old_one(remote: Remote, model: Path):
    old = Path(on_this_node(remote.settings()).path)
    remote.put(WEIGHTS, b"others")
    new = Path(on_this_node(remote.settings()).path)
    assert new != old
    assert (new / WEIGHTS).read_bytes() == b"others"
    assert (old / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    other = "vae/diffusion_pytorch_model.safetensors"
    assert (new / other).samefile(old / other)


def test_who_is_killed_in_the_midst_leaves_nothing_in_the_way(remote: Remote):
    data = os.urandom(48 << 20)
    remote.put_in_parts("large.safetensors", data)
    settings = remote.settings("large.safetensors", connections=1)
    victim = remote.elsewhere(settings)
    wait_until(lambda: any((remote._cache / "files").glob("*.part-*")), 60.0)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert Path(on_this_node(settings).path).read_bytes() == data
    assert not list((remote._cache / "files").glob("*.part-*"))


def test_models_nobody_uses_make_room_and_those_in_use_do_not(remote: Remote):
    for name in ("a", "b", "c"):
        remote.put(f"{name}.safetensors", name.encode() * (6 << 20))
    bound = {"cache_gib": 13 / 1024}  # two of them
    for name in ("a", "b"):
        remote.elsewhere(remote.settings(f"{name}.safetensors", **bound)).communicate(timeout=60)
    assert len(list((remote._cache / "models").glob("*.json"))) == 2
    kept = [on_this_node(remote.settings(f"{each}.safetensors", **bound)).path for each in "cb"]
    assert [Path(each).read_bytes()[:1] for each in kept] == [b"c", b"b"]
    assert len(list((remote._cache / "models").glob("*.json"))) == 2
    with pytest.raises(ConfigurationError, match="in use") as refused:
        on_this_node(remote.settings("a.safetensors", **bound))
    assert refused.value.field == "model.source.cache_gib"


def test_a_model_larger_than_the_cache_is_refused_with_the_arithmetic(remote: Remote):
    remote.put("a.safetensors", bytes(2 << 20))
    with pytest.raises(ConfigurationError, match=r"0\.00 GiB, the cache at most") as refused:
        on_this_node(remote.settings("a.safetensors", cache_gib=1 / 1024))
    assert refused.value.field == "model.source.cache_gib"
    assert not list((remote._cache / "files").iterdir())


def test_without_its_store_a_node_takes_the_version_that_it_has(
    remote: Remote, model: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = on_this_node(remote.settings()).path

    def refuse(*_: Any, **__: Any) -> Any:
        raise StorageUnavailable("It is gone.", field="storage.endpoint_url")

    monkeypatch.setattr("serve.model_cache.transfer.s3_client", refuse)
    assert on_this_node(remote.settings()).path == folder
    Path(folder, WEIGHTS).unlink()
    with pytest.raises(StorageUnavailable):
        on_this_node(remote.settings())


def test_without_its_store_what_a_cache_that_cannot_be_written_has_is_not_taken(
    remote: Remote, model: Path, monkeypatch: pytest.MonkeyPatch
):
    remote.elsewhere(remote.settings()).communicate(timeout=60)
    shutil.rmtree(remote._cache / "locks")
    (remote._cache / "locks").write_bytes(b"")  # root may write whatever its mode says

    def refuse(*_: Any, **__: Any) -> Any:
        raise StorageUnavailable("It is gone.", field="storage.endpoint_url")

    monkeypatch.setattr("serve.model_cache.transfer.s3_client", refuse)
    with pytest.raises(StorageUnavailable):
        on_this_node(remote.settings())


@pytest.mark.parametrize(
    ("path", "source", "field"),
    [
        ("nothing/here", {}, "model.path"),
        ("none.safetensors", {}, "model.path"),
        ("", {"endpoint_url": "http://127.0.0.1:9"}, "model.source.endpoint_url"),
        ("", {"credentials_file": "/nowhere"}, "model.source.credentials_file"),
        ("", {"cache_dir": "/proc/kelvin"}, "model.source.cache_dir"),
    ],
)
def test_what_is_wrong_is_told_by_the_setting(
    remote: Remote, path: str, source: dict[str, Any], field: str
):
    remote.put("model_index.json", b"{}")
    with pytest.raises(KelvinError) as refused:
        on_this_node(remote.settings(path, **source))
    assert refused.value.field == field
    assert refused.value.allowed
    assert "secret" not in str(refused.value.body()).lower().replace("aws_secret_access_key", "")


def test_a_bucket_that_does_not_exist(remote: Remote):
    settings = remote.settings().model_copy(update={"path": "s3://no-such-bucket-here/model"})
    with pytest.raises(StorageUnavailable) as refused:
        on_this_node(settings)
    assert (refused.value.field, refused.value.value) == ("model.path", settings.path)
