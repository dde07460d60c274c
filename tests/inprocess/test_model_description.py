"""Who builds the application or takes requests knows a model of an S3 store without its weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from serve.app import build
from serve.checkpoints.tensor_files import TensorFiles
from serve.config import Settings, StorageSettings
from serve.errors import ConfigurationError, StorageUnavailable
from serve.loras import LoraLibrary
from serve.model_cache.description import described_on_this_node
from serve.model_dir import lora_roots, model_files, resolve_model_dir
from serve.models import ModelSpec
from tests.inprocess.remote_model import Remote, files_in, uploaded_pico


@pytest.fixture
def remote(s3: StorageSettings, storage: StorageSettings, tmp_path: Path) -> Remote:
    return Remote(s3, f"{storage.prefix}pico", tmp_path / "cache")


@pytest.fixture
def model(remote: Remote, tmp_path: Path) -> Path:
    return uploaded_pico(remote, tmp_path / "written")


def test_all_but_weights_come_and_what_their_headers_say(remote: Remote, model: Path):
    remote.put("loras/one.safetensors", save({"a": np.ones(3, np.float32)}))
    settings = remote.settings()
    folder = resolve_model_dir(settings, weights=False)
    here, there = files_in(folder), files_in(model)
    assert here.pop("loras/one.safetensors") == save({"a": np.ones(3, np.float32)})
    weights = {path for path in there if path.endswith(".safetensors")}
    assert weights
    assert {path: here[path] for path in here.keys() - weights} == {
        path: there[path] for path in there.keys() - weights
    }
    for path in weights:
        begin = 8 + int.from_bytes(there[path][:8], "little")
        assert here[path] == there[path][:begin].ljust(len(there[path]), b"\0")
    assert not (remote._cache / "files").exists()
    assert lora_roots(settings, weights=False) == [folder]

    told, known = (model_files(settings, weights=each).parts for each in (False, True))
    assert {kind: found.config for kind, found in told.items()} == {
        kind: found.config for kind, found in known.items()
    }
    for kind, found in told.items():
        assert found.part.weights.keys() == known[kind].part.weights.keys()
        assert found.part.files.size == known[kind].part.files.size


def test_the_application_is_built_and_loras_are_known_without_a_weight(
    remote: Remote, model: Path, tmp_path: Path
):
    pool = {"name": "denoiser", "num_gpus": 1, "accelerator_type": "T4"}
    settings = Settings(model=remote.settings(), denoiser=[pool])
    assert build(settings) is not None
    assert LoraLibrary(settings.model, settings.lora, weights=False).available() == []
    assert not (remote._cache / "files").exists()
    huge = {**pool, "warm_sizes": [[8192, 8192]], "warm_rows": [32]}
    with pytest.raises(ConfigurationError, match="does not fit"):
        build(Settings(model=remote.settings(), denoiser=[huge]))


def test_notes_on_quantisation_are_in_their_places(remote: Remote):
    note = b'{"format": "float8_e4m3fn"}'
    tensors: dict[str, Any] = {
        "x.weight": np.arange(1, 5000, dtype=np.uint8),
        "x.comfy_quant": np.frombuffer(note, np.uint8),
    }
    remote.put("one.safetensors", save(tensors))
    path = Path(described_on_this_node(remote.settings("one.safetensors")).path)
    files = TensorFiles.of([path])
    assert files.read_small("x.comfy_quant") == note
    assert not any(files.read_small("x.weight"))


def test_a_header_longer_than_the_first_look(remote: Remote, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.model_cache.description._FIRST_BYTES", 100)
    data = save({f"tensor{n}": np.ones(1, np.float32) for n in range(50)})
    remote.put("one.safetensors", data)
    path = Path(described_on_this_node(remote.settings("one.safetensors")).path)
    assert len(TensorFiles.of([path]).tensors) == 50


def test_a_new_version_is_described_anew_and_without_the_store_the_last_one_is_taken(
    remote: Remote, model: Path, monkeypatch: pytest.MonkeyPatch
):
    first = Path(described_on_this_node(remote.settings()).path)
    assert described_on_this_node(remote.settings()).path == str(first)
    remote.put("kelvin.json", b'{"name": "other"}')
    second = Path(described_on_this_node(remote.settings()).path)
    assert ModelSpec.from_directory(second).name == "other"
    assert first.is_dir()

    def refuse(*_: Any, **__: Any) -> Any:
        raise StorageUnavailable("It is gone.", field="storage.endpoint_url")

    monkeypatch.setattr("serve.model_cache.transfer.s3_client", refuse)
    assert described_on_this_node(remote.settings()).path == str(second)


def test_few_descriptions_are_kept(remote: Remote, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.model_cache.description._KEPT", 2)
    for number in range(4):
        remote.put("one.safetensors", save({"a": np.ones(number + 1, np.float32)}))
        path = Path(described_on_this_node(remote.settings("one.safetensors")).path)
        assert path.is_file()
    assert len(list((remote._cache / "described").iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_told_by_its_setting(remote: Remote):
    remote.put("one.safetensors", save({"a": np.ones(1, np.float32)}))
    with pytest.raises(ConfigurationError) as refused:
        described_on_this_node(remote.settings("one.safetensors", cache_dir="/proc/kelvin"))
    assert refused.value.field == "model.source.cache_dir"
