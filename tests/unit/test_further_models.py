"""A further model's pools: shared where the files are the same, its own where they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.builtin.pico import write_pico
from loadtest.checkpoint_formats import write_comfyui
from serve.app import ModelApplication, build, build_model
from serve.checkpoints.fingerprint import fingerprint
from serve.commands.models import entry_of
from serve.config import ModelEntry, ModelSettings, Settings
from serve.errors import ConfigurationError
from serve.further_models import further_model, further_models
from serve.model_dir import resolve_model_dir


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_pico(tmp_path / "own", seed=0)


@pytest.fixture
def other(tmp_path: Path, own: Path) -> Path:
    """The same files elsewhere, but for the transformer: as Turbo beside Large."""
    other = Path(shutil.copytree(own, tmp_path / "turbo"))
    _change(other / "transformer", lambda tensor: tensor * 1.01)
    return other


def _change(folder: Path, how: Any) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda each: tensors[each].numel())
    if tensors[name].dtype.itemsize > 1:
        tensors[name] = how(tensors[name])
    else:
        tensors[name] = how(tensors[name].float()).to(tensors[name].dtype)
    save_file(tensors, file)


def service_of(own: Path) -> Settings:
    return Settings.model_validate({"model": {"path": str(own)}})


def entry(folder: Path, **pools: Any) -> ModelEntry:
    return ModelEntry.model_validate({"model": {"path": str(folder), "name": "turbo"}, **pools})


def test_encoders_and_vae_of_the_same_content_are_shared(own: Path, other: Path):
    facts = further_model(service_of(own), entry(other))
    assert facts.spec.name == "turbo"
    assert facts.shared == {"text", "decode"}
    assert facts.settings.pools["text"] == service_of(own).pools["text"]
    assert [pool.name for pool in facts.own_pools["denoise"]] == ["denoiser-turbo"]
    assert facts.own_pools.keys() == {"denoise"}


def test_one_weight_that_differs_makes_pools_of_its_own(own: Path, other: Path):
    _change(other / "vae", lambda tensor: tensor * 1.01)
    facts = further_model(service_of(own), entry(other))
    assert facts.shared == {"text"}
    assert [pool.name for pool in facts.own_pools["decode"]] == ["vae-decoder-turbo"]


@pytest.mark.parametrize("where", ["text_encoder", "text_encoder_3"])
def test_another_encoder_or_tokenizer_is_not_shared(own: Path, other: Path, where: str):
    _change(other / where, lambda tensor: -tensor)
    assert further_model(service_of(own), entry(other)).shared == {"decode"}


def test_configurations_count_and_notes_in_them_do_not(own: Path, other: Path):
    file = other / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_diffusers_version": "9.9", "_name_or_path": "x"}))
    assert further_model(service_of(own), entry(other)).shared == {"text", "decode"}
    file.write_text(json.dumps(config | {"scaling_factor": 1.0}))
    assert further_model(service_of(own), entry(other)).shared == {"text"}
    (other / "tokenizer_3" / "more.txt").write_text("x")
    assert further_model(service_of(own), entry(other)).shared == set()


def test_encoders_are_not_shared_with_loras_that_others_do_not_find(own: Path, other: Path):
    (other / "loras").mkdir()
    assert further_model(service_of(own), entry(other)).shared == {"decode"}
    (other / "loras").rmdir()
    (own / "loras").mkdir()
    (other / "loras").symlink_to(own / "loras")
    assert further_model(service_of(own), entry(other)).shared == {"text", "decode"}


def test_single_files_of_the_same_parts_are_the_same(tmp_path: Path, own: Path, other: Path):
    folders = []
    for name, model in (("one", own), ("two", other)):
        write_comfyui(model, tmp_path / name, name=f"{name}.safetensors")
        settings = ModelSettings(path=f"{name}.safetensors", models_dir=str(tmp_path / name))
        folders.append(resolve_model_dir(settings))
    for stage in ("text", "decode"):
        assert fingerprint(folders[0], stage) == fingerprint(folders[1], stage)


def test_stated_pools_are_taken_and_nothing_is_compared(own: Path, other: Path):
    shutil.rmtree(other / "vae")
    shutil.copytree(own / "vae", other / "vae")
    stated = entry(
        other,
        denoiser=[{"name": "a", "num_gpus": 0.5}, {"name": "b"}],
        text_encoder=[{"name": "t"}],
        vae_decoder=[{"name": "v"}],
    )
    facts = further_model(service_of(own), stated)
    assert facts.shared == set()
    assert facts.pool_names == ["t", "a", "b", "v"]


def test_pools_that_are_not_stated_are_like_the_services(own: Path, other: Path):
    pool = {"name": "large", "num_gpus": 0.6, "warm_sizes": [[1024, 1024]], "warm_rows": [2]}
    service = service_of(own).model_validate(
        {"model": {"path": str(own)}, "denoiser": [pool], "models": []}
    )
    (made,) = further_model(service, entry(other)).settings.denoiser
    assert (made.name, made.num_gpus) == ("denoiser-turbo", 0.6)
    assert (made.warm_sizes, made.warm_rows) == ((), ())
    tree = {
        "model": {"path": str(other), "name": "turbo"},
        "denoiser": {"num_gpus": 1, "warm_rows": [4]},
    }
    (changed,) = entry_of(tree, service).denoiser
    assert (changed.name, changed.num_gpus, changed.warm_rows) == ("denoiser-turbo", 1, (4,))


@pytest.mark.parametrize(
    ("models", "field"),
    [
        ([{"name": "large"}], "models.model.name"),
        ([{"name": "a"}, {"name": "a"}], "models.model.name"),
        ([{"name": "a b"}], "model.name"),
        ([{"name": "../a"}], "model.name"),
    ],
)
def test_a_name_that_is_taken_or_none_is_refused(own: Path, models: list[Any], field: str):
    service = Settings.model_validate(
        {
            "model": {"path": str(own), "name": "large"},
            "models": [{"model": {"path": str(own), **model}} for model in models],
        }
    )
    with pytest.raises(ConfigurationError) as caught:
        further_models(service, "large")
    assert caught.value.field == field


def test_a_pools_name_belongs_to_one_model(own: Path, other: Path):
    with pytest.raises(ConfigurationError, match="text-encoder"):
        further_model(service_of(own), entry(other, denoiser=[{"name": "text-encoder"}]))
    service = {
        "model": {"path": str(own)},
        "models": [
            {"model": {"path": str(other), "name": name}, "denoiser": [{"name": "same"}]}
            for name in ("a", "b")
        ],
    }
    with pytest.raises(ValueError, match="name of its own"):
        Settings.model_validate(service)


def test_files_of_another_kind_are_refused_with_their_name(tmp_path: Path, own: Path):
    file = tmp_path / "flux.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ConfigurationError):
        further_model(service_of(own), entry(file))


def test_one_application_has_one_model(own: Path, other: Path):
    settings = Settings.model_validate(
        {"model": {"path": str(own)}, "models": [entry(other).model_dump()]}
    )
    with pytest.raises(ConfigurationError) as caught:
        build(settings)
    assert caught.value.field == "models"
    assert build_model(ModelApplication(service=settings, entry=settings.models[0]))
