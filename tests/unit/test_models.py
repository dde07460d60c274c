"""What a model folder says about itself, and what a request becomes by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.config import ModelSettings
from serve.errors import ConfigurationError, InvalidRequest
from serve.model_dir import resolve_model_dir
from serve.models import STABILITY_LICENCE, ModelSpec
from serve.requests import GenerateRequest

SMALL = {"patch_size": 2, "pos_embed_max_size": 32, "sample_size": 32, "in_channels": 16}
LARGE = SMALL | {
    "pos_embed_max_size": 192,
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
}
MEDIUM = SMALL | {
    "pos_embed_max_size": 384,
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "dual_attention_layers": list(range(13)),
}


def folder(path: Path, transformer: dict[str, Any], **files: dict[str, Any]) -> Path:
    contents = {
        "model_index.json": {"_class_name": "StableDiffusion3Pipeline"},
        "transformer/config.json": transformer,
        "vae/config.json": {"block_out_channels": [1, 2, 3, 4]},
        "scheduler/scheduler_config.json": {"shift": 3.0},
        **{name.replace("__", "/") + ".json": content for name, content in files.items()},
    }
    for name, content in contents.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(content))
    return path


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return ModelSpec.from_directory(folder(tmp_path, SMALL), "small")


def test_limits_come_from_the_configuration(spec: ModelSpec):
    assert (spec.defaults.width, spec.defaults.height) == (256, 256)
    assert (spec.largest_width, spec.largest_height) == (512, 512)
    assert spec.largest_area == 512 * 512
    assert spec.latent_channels == 16
    assert spec.size_multiple == 16


@pytest.mark.parametrize(
    ("name", "transformer", "steps", "guidance", "largest"),
    [
        ("stable-diffusion-3.5-large", LARGE, 40, 4.5, 3072),
        ("stable-diffusion-3.5-large-turbo", LARGE, 4, 1.0, 3072),
        ("stable-diffusion-3.5-medium", MEDIUM, 50, 5.0, 6144),
    ],
)
def test_stabilitys_models_are_known(
    tmp_path: Path,
    name: str,
    transformer: dict[str, Any],
    steps: int,
    guidance: float,
    largest: int,
):
    spec = ModelSpec.from_directory(folder(tmp_path / name, transformer))
    assert spec.name == name
    assert spec.licence == STABILITY_LICENCE
    assert "1 M USD" in spec.licence
    assert spec.defaults.num_inference_steps == steps
    assert spec.defaults.guidance_scale == guidance
    assert (spec.defaults.width, spec.largest_width) == (1024, largest)
    assert spec.largest_area == 2048 * 2048


def test_a_folder_may_state_its_own_defaults(tmp_path: Path):
    own = {"name": "mine", "license": "CC0", "width": 320, "sampler": "dpmpp_2m", "other": [1]}
    spec = ModelSpec.from_directory(folder(tmp_path, SMALL, kelvin=own))
    assert (spec.name, spec.licence) == ("mine", "CC0")
    resolved = spec.resolve(GenerateRequest(prompt="a"))
    assert (resolved.width, resolved.height, resolved.sampler) == (320, 256, "dpmpp_2m")


@pytest.mark.parametrize(
    "own",
    [
        {"num_inference_steps": 10**9},
        {"num_inference_steps": -5},
        {"guidance_scale": float("nan")},
        {"shift": 0},
        {"max_sequence_length": 10**6},
    ],
)
def test_defaults_that_no_request_could_ask_for_are_refused(tmp_path: Path, own: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=next(iter(own))):
        ModelSpec.from_directory(folder(tmp_path, SMALL, kelvin=own))


def test_a_folder_may_state_the_sizes_it_was_trained_for(tmp_path: Path):
    spec = ModelSpec.from_directory(
        folder(tmp_path, SMALL, kelvin={"min_size": 128, "max_size": 384})
    )
    assert (spec.smallest_side, spec.largest_width, spec.largest_height) == (128, 384, 384)
    for width in (112, 400):
        with pytest.raises(InvalidRequest) as caught:
            spec.resolve(GenerateRequest(prompt="a", width=width))
        assert "from 128 to 384" in (caught.value.allowed or "")


def test_larger_pictures_than_it_was_trained_for_come_with_a_warning(tmp_path: Path):
    own = {"max_size": 384, "largest_side": 1024, "trained_sides": [192, 320]}
    spec = ModelSpec.from_directory(folder(tmp_path, SMALL, kelvin=own))
    assert (spec.largest_width, spec.largest_area) == (1024, 1024 * 1024)
    assert spec.warnings(spec.resolve(GenerateRequest(prompt="a"))) == ()
    for width, height in ((1024, 1024), (128, 256), (256, 336)):
        large = spec.resolve(GenerateRequest(prompt="a", width=width, height=height))
        (warning,) = spec.warnings(large)
        assert f"{width} x {height}" in warning
        assert "from 192 to 320" in warning
    with pytest.raises(InvalidRequest, match="1040"):
        spec.resolve(GenerateRequest(prompt="a", width=1040))


def test_the_t5_length_follows_the_tokenizer(tmp_path: Path):
    files = {"tokenizer_3__tokenizer_config": {"model_max_length": 48}}
    spec = ModelSpec.from_directory(folder(tmp_path, SMALL, **files))
    assert spec.defaults.max_sequence_length == 48


@pytest.mark.parametrize(
    "broken",
    [
        {"patch_size": 2},
        SMALL | {"sample_size": "big"},
        SMALL | {"sample_size": 0},
        SMALL | {"in_channels": None},
    ],
)
def test_an_unusable_configuration_is_said(tmp_path: Path, broken: dict[str, Any]):
    with pytest.raises(ConfigurationError) as caught:
        ModelSpec.from_directory(folder(tmp_path, broken))
    assert caught.value.value == str(tmp_path)


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff"])
def test_an_unreadable_folder_is_said(tmp_path: Path, content: bytes | None):
    folder(tmp_path, SMALL)
    file = tmp_path / "transformer" / "config.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        ModelSpec.from_directory(tmp_path)


def test_a_missing_folder_is_said(tmp_path: Path):
    with pytest.raises(ConfigurationError) as caught:
        resolve_model_dir(ModelSettings(path=str(tmp_path / "nowhere")))
    assert caught.value.field == "model.path"


def test_resolving_fills_every_default_and_draws_a_seed(spec: ModelSpec):
    request = GenerateRequest(prompt="a")
    first, second = spec.resolve(request), spec.resolve(request)
    assert first.model == "small"
    assert all(getattr(first, name) is not None for name in type(spec.defaults).model_fields)
    assert first.seed is not None
    assert 0 <= first.seed < 2**53
    assert first.seed != second.seed
    assert first.model_copy(update={"seed": None}) == second.model_copy(update={"seed": None})


def test_resolving_twice_changes_nothing(spec: ModelSpec):
    resolved = spec.resolve(GenerateRequest(prompt="a", seed=2**64 - 1, shift=1.5))
    assert spec.resolve(resolved) == resolved
    assert GenerateRequest.model_validate_json(resolved.model_dump_json()) == resolved


@given(
    width=st.integers(1, 64).map(lambda n: 16 * n), height=st.integers(1, 64).map(lambda n: 16 * n)
)
def test_every_size_is_taken_or_refused_by_name(width: int, height: int):
    spec = ModelSpec(
        name="oblong",
        licence="",
        defaults={"width": 256, "height": 256},
        latent_channels=16,
        size_multiple=16,
        smallest_side=64,
        largest_width=512,
        largest_height=768,
        largest_area=300_000,
    )
    fits = 64 <= width <= 512 and 64 <= height <= 768 and width * height <= 300_000
    request = GenerateRequest(prompt="a", width=width, height=height)
    if fits:
        assert (spec.resolve(request).width, spec.resolve(request).height) == (width, height)
        return
    with pytest.raises(InvalidRequest) as caught:
        spec.resolve(request)
    assert caught.value.field in ("width", "height")
    assert caught.value.value in (width, height)
    assert "300000" in (caught.value.allowed or "")


def test_a_size_left_out_meets_the_limits_with_the_default(tmp_path: Path):
    own = {"height": 512}
    spec = ModelSpec.from_directory(folder(tmp_path, SMALL | {"sample_size": 16}, kelvin=own))
    with pytest.raises(InvalidRequest) as caught:
        spec.resolve(GenerateRequest(prompt="a", width=256))
    assert caught.value.field == "height"
