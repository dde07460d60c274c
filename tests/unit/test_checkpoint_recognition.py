"""What files are, told by their headers alone: real sizes, without a byte of weights."""

from pathlib import Path
from typing import Any

import pytest

from loadtest.sd35 import config
from serve.checkpoints.architecture import expected_shapes
from serve.checkpoints.model_files import find_model
from serve.commands.model_files import check_model
from serve.config import ModelSettings
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec
from tests.unit.header_files import (
    NAME,
    checkpoint,
    encoders,
    found,
    large,
    models_folder,
    original,
    write_sparse,
)


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return models_folder(tmp_path, monkeypatch)


@pytest.mark.parametrize("folder", ["checkpoints", "diffusion_models", "unet"])
@pytest.mark.parametrize("dtype", ["F16", "F8_E4M3"])
def test_large_is_recognised_and_its_encoders_are_those_that_fit(models_dir, folder, dtype):
    encoders(models_dir)
    write_sparse(models_dir / folder / NAME, large(), dtype)
    model = found(models_dir)
    assert model.variant == "large"
    t5 = model.parts["t5"].part.files.paths[0].name
    assert t5 == ("t5xxl_fp16" if dtype == "F16" else "t5xxl_fp8_e4m3fn") + ".safetensors"
    assert len(model.notes) == 1
    assert model.parts["transformer"].config["num_attention_heads"] == 38
    spec = ModelSpec.from_directory(
        resolve_model_dir(ModelSettings(path=NAME, models_dir=str(models_dir)))
    )
    assert (spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == (40, 4.5)
    assert (spec.defaults.width, spec.largest_width) == (1024, 3072)


def test_medium_is_recognised_by_its_tensors(models_dir):
    encoders(models_dir)
    checkpoint(models_dir, original(expected_shapes("transformer", config("medium"))))
    model = found(models_dir)
    assert model.variant == "medium"
    transformer = model.parts["transformer"].config
    assert transformer["dual_attention_layers"] == list(range(13))
    assert transformer["pos_embed_max_size"] == 384


@pytest.mark.parametrize("told", ["setting", "metadata", "name"])
def test_turbo_is_told_by_setting_metadata_or_name(models_dir, told):
    encoders(models_dir)
    metadata = {"modelspec.title": "SD3.5 Large Turbo"} if told == "metadata" else {}
    path = checkpoint(models_dir, large(), metadata=metadata)
    name = "sd3.5_large_turbo.safetensors" if told == "name" else NAME
    path.rename(path.with_name(name))
    fields: dict[str, Any] = {"variant": "large-turbo"} if told == "setting" else {}
    settings = ModelSettings(path=name, models_dir=str(models_dir), **fields)
    assert find_model(settings).variant == "large-turbo"
    defaults = ModelSpec.from_directory(resolve_model_dir(settings)).defaults
    stated = (defaults.num_inference_steps, defaults.guidance_scale, defaults.sampler)
    assert stated == (4, 1.0, "euler")


def test_t5_may_be_left_out(models_dir):
    encoders(models_dir, t5=False)
    checkpoint(models_dir, large())
    model = found(models_dir)
    assert "t5" not in model.parts
    assert "T5 is not loaded" in model.warnings[0]


def test_named_files_are_taken_instead_of_looking(models_dir):
    encoders(models_dir)
    checkpoint(models_dir, large(), "F8_E4M3")
    names = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
    model = found(models_dir, text_encoders=names, vae="sd3.safetensors")
    assert model.parts["t5"].part.files.paths[0].name == "t5xxl_fp16.safetensors"
    assert "t5" not in found(models_dir, text_encoders=names[:2]).parts


def test_doctor_says_what_a_model_is_and_where_it_fits(models_dir):
    encoders(models_dir)
    checkpoint(models_dir, large(), "F16")
    findings = {
        each.name: each
        for each in check_model(ModelSettings(path=NAME, models_dir=str(models_dir)))
    }
    assert {each.verdict for each in findings.values()} == {"ok"}
    assert "Stable Diffusion 3.5 Large" in findings["model"].detail
    figures = findings["transformer"].figures
    assert figures is not None
    # 8.1 B parameters: facts of the model's publishers.
    assert 16.0e9 < figures["disk_bytes"] < 16.5e9
    assert 8.0e9 < figures["resident_bytes"]["fp8"] < 8.4e9
    a10g, l4 = findings["on A10G 24 GB"].figures, findings["on L4 24 GB"].figures
    assert a10g is not None
    assert l4 is not None
    assert l4["precision"]["denoise"] == "fp8 weights, fp8 arithmetic"
    assert "bf16" in a10g["precision"]["denoise"]
    assert set(l4["stages"]) == {"text", "denoise", "decode"}
    assert "Community License" in findings["licence"].detail
