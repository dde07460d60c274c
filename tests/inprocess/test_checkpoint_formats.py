"""One model in every format: the same weights in memory, bit for bit where the format is exact.

In pico, so that it is quick; the same files of the built-in model draw what is asked.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.builtin.checker import check
from deployments.builtin.dequantise import dequantized_directory
from deployments.builtin.read import read_claims
from deployments.payloads import TextJob
from deployments.sd3.fp8 import Fp8Linear
from deployments.sd3.mmdit import Mmdit, load_transformer
from deployments.sd3.precision import PrecisionChoice
from deployments.sd3.text import TextEncoders
from deployments.sd3.vae import VaeDecoder
from loadtest.checkpoint_formats import (
    FP8_FORMS,
    TRANSFORMER,
    Fp8Form,
    in_fp8,
    is_block_linear,
    original_transformer,
    read_part,
    write_comfyui,
)
from loadtest.picture_batches import PictureBatches, PictureSettings
from serve.config import ModelSettings
from serve.errors import ConfigurationError
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec
from tests.inprocess.pico_folder import pico_as_stored

CPU = torch.device("cpu")
FP8 = PrecisionChoice("fp8", "fp8", torch.float32, "for a test")
FP8_PRODUCTS = PrecisionChoice("fp8", "fp8", torch.bfloat16, "for a test", "scaled_mm")
FULL = PrecisionChoice("fp32", "fp32", torch.float32, "for a test")
BUILTIN = Path(__file__).parents[2] / "deployments" / "builtin" / "weights"
JOB = TextJob("a red circle", "a blue square", "a green star", 16)
NAME = "sd35.safetensors"


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_as_stored(tmp_path_factory.mktemp("formats") / "pico")


@pytest.fixture(scope="module")
def plain(pico: Path) -> Path:
    """The same model in float16, as a Diffusers directory."""
    return dequantized_directory(pico, pico.parent / "plain", torch.float16)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def resolved(models_dir: Path, name: str = NAME, **fields: Any) -> Path:
    return resolve_model_dir(ModelSettings(path=name, models_dir=str(models_dir), **fields))


def resident(model_dir: Path, precision: PrecisionChoice) -> dict[str, Tensor]:
    return dict(load_transformer(model_dir, CPU, precision).state_dict())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        one, other = ours[name], tensor
        assert one.dtype == other.dtype, name
        assert torch.equal(one.float(), other.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", [FP8, FULL], ids=["fp8", "fp32"])
def test_an_ordinary_single_file_is_the_directory(pico, tmp_path, dtype, precision):
    directory = dequantized_directory(pico, tmp_path / "directory", dtype)
    write_comfyui(directory, tmp_path / "models", name=NAME, form=None, dtype=dtype)
    single = resolved(tmp_path / "models")
    assert_same(resident(single, precision), resident(directory, precision))


def test_everything_in_one_file_is_the_directory_too(pico, plain, tmp_path):
    write_comfyui(plain, tmp_path / "models", name=NAME, form=None, all_in_one=True)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["checkpoints"]
    checkpoint = tmp_path / "models" / "checkpoints" / NAME
    for settings in (
        ModelSettings(path=NAME, models_dir=str(tmp_path / "models"), tokenizers=str(pico)),
        ModelSettings(path=str(checkpoint), tokenizers=str(pico)),
    ):
        single = resolve_model_dir(settings)
        assert_same(resident(single, FULL), resident(plain, FULL))
        ours, theirs = (
            TextEncoders.load(each, CPU, FULL).encode([JOB]) for each in (single, plain)
        )
        assert np.array_equal(ours[0].prompt_embeds, theirs[0].prompt_embeds)
        assert np.array_equal(ours[0].pooled_prompt_embeds, theirs[0].pooled_prompt_embeds)
        latents = np.random.default_rng(0).normal(size=(16, 4, 4)).astype(np.float32)
        drawn, expected = (
            VaeDecoder.load(each, CPU, FULL).decode(latents) for each in (single, plain)
        )
        assert np.array_equal(drawn, expected)


@pytest.fixture(scope="module")
def in_rows(pico: Path) -> Path:
    """The reference of the FP8 forms: Kelvin's own keys."""
    models_dir = pico.parent / "rows"
    write_comfyui(pico, models_dir, name=NAME, form="rows")
    return models_dir


@pytest.mark.parametrize("form", ["older", "newer", "metadata"])
def test_every_scaled_form_is_the_same_weights(pico, in_rows, tmp_path, form):
    write_comfyui(pico, tmp_path / "models", name=NAME, form=form)
    ours, theirs = resolved(tmp_path / "models"), resolved(in_rows)
    assert_same(resident(ours, FP8), resident(theirs, FP8))
    encoded = [TextEncoders.load(each, CPU, FP8).encode([JOB])[0] for each in (ours, theirs)]
    assert np.array_equal(encoded[0].prompt_embeds, encoded[1].prompt_embeds)


@pytest.mark.parametrize("form", FP8_FORMS)
def test_resident_fp8_is_the_file_s_values(pico, tmp_path, form):
    write_comfyui(pico, tmp_path / "models", name=NAME, form=form)
    assert_fp8_is_what_the_file_says(resolved(tmp_path / "models"), form == "e5m2")


def assert_fp8_is_what_the_file_says(model_dir: Path, e5m2: bool = False) -> None:
    """Codes times scales, held in FP8, are the numbers that full precision loading gives."""
    held, full = load_transformer(model_dir, CPU, FP8), resident(model_dir, FULL)
    layers = {n: m for n, m in held.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) > 20
    for name, layer in layers.items():
        ours, theirs = layer.dequantized(torch.float32), full[f"{name}.weight"]
        largest = theirs.abs().amax(dim=1, keepdim=True)
        # E5M2 reaches further down than E4M3: 15 binades below its row's largest it is rounded.
        reached = (theirs.abs() >= largest * 2.0**-15) | (theirs == 0)
        assert torch.equal(ours[reached], theirs[reached]), name
        assert ((ours - theirs).abs() <= largest * 2.0**-17).all(), name
        assert torch.equal(ours, theirs) or e5m2, name


def test_a_plain_cast_keeps_the_codes_of_the_file(pico, tmp_path):
    checkpoint = write_comfyui(pico, tmp_path / "models", name=NAME, form="cast")
    stored = load_file(checkpoint)[TRANSFORMER + "joint_blocks.0.x_block.attn.qkv.weight"]
    model = load_transformer(resolved(tmp_path / "models"), CPU, FP8)
    parts = stored.chunk(3)
    for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
        layer = model.get_submodule(f"transformer_blocks.0.attn.{name}")
        assert isinstance(layer, Fp8Linear)
        assert torch.equal(layer.weight_fp8.view(torch.uint8), part.view(torch.uint8))
        assert torch.equal(layer.weight_scale, torch.ones(len(part)))


def rewritten(pico: Path, models_dir: Path, form: Fp8Form, **how: Any) -> None:
    """Replace the checkpoint by one of another form."""
    write_comfyui(pico, models_dir, name=NAME, form=form)
    state = original_transformer(read_part(pico / "transformer"))
    tensors, metadata = in_fp8(state, form, is_block_linear, TRANSFORMER, **how)
    stored = models_dir / "checkpoints" / NAME
    kept = {"kelvin.hints": hints(stored)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, stored, metadata | kept)


def hints(checkpoint: Path) -> str:
    size = int.from_bytes(checkpoint.read_bytes()[:8], "little")
    header = json.loads(checkpoint.read_bytes()[8 : 8 + size])
    return str(header["__metadata__"]["kelvin.hints"])


@pytest.mark.parametrize("form", ["older", "newer", "metadata"])
@pytest.mark.parametrize("full", [True, False], ids=["full precision", "fp8 products"])
def test_layers_multiply_as_the_file_asks(pico, tmp_path, form, full):
    rewritten(pico, tmp_path / "models", form, full_precision=full, input_scale=0.25)
    model = load_transformer(resolved(tmp_path / "models"), CPU, FP8_PRODUCTS)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Fp8Linear) and name.startswith("transformer_blocks.")
    }
    fitting = [x for x in layers.values() if not x.in_features % 16 and not x.out_features % 16]
    expected = "dequantize" if full else "scaled_mm"
    assert {layer.arithmetic for layer in fitting} == {expected}
    assert {float(layer.input_scale) for layer in layers.values()} == {0.25}  # type: ignore[arg-type]
    mmdit = Mmdit.load(resolved(tmp_path / "models"), "cpu", FP8_PRODUCTS)
    velocity = mmdit.velocity(
        torch.zeros(1, 16, 8, 8),
        torch.tensor([0.5]),
        torch.zeros(1, 7, mmdit.joint_attention_dim),
        torch.zeros(1, mmdit.pooled_projection_dim),
    )
    assert torch.isfinite(velocity).all()


def test_t5_left_out_is_served_with_a_warning(pico, tmp_path):
    write_comfyui(pico, tmp_path / "models", name=NAME, with_t5=False)
    model_dir = resolved(tmp_path / "models")
    encoders = TextEncoders.load(model_dir, CPU, FULL)
    (encoded,) = encoders.encode([JOB])
    assert (encoded.prompt_embeds[encoders.clip_length :] == 0).all()
    assert any("T5" in said for said in encoded.warnings)
    (empty,) = encoders.encode([TextJob("", "", "", 16)])
    assert empty.warnings == ()


def test_settings_are_over_the_file_s_defaults_which_are_over_the_variant_s(pico, tmp_path):
    write_comfyui(pico, tmp_path / "models", name=NAME)
    assert ModelSpec.from_directory(resolved(tmp_path / "models")).defaults.num_inference_steps == 4
    spec = ModelSpec.from_directory(
        resolved(tmp_path / "models", num_inference_steps=9, max_size=128, variant="large-turbo")
    )
    assert (spec.defaults.num_inference_steps, spec.largest_width) == (9, 128)
    directory = resolve_model_dir(ModelSettings(path=str(pico), guidance_scale=2.5))
    spec = ModelSpec.from_directory(directory)
    assert (spec.defaults.guidance_scale, spec.defaults.num_inference_steps) == (2.5, 4)
    assert_same(resident(directory, FP8), resident(pico, FP8))


def test_a_file_that_was_changed_after_it_was_looked_at_is_refused(pico, tmp_path):
    checkpoint = write_comfyui(pico, tmp_path / "models", name=NAME)
    model_dir = resolved(tmp_path / "models")
    checkpoint.write_bytes(checkpoint.read_bytes() + b"x")
    with pytest.raises(ConfigurationError, match="changed since"):
        load_transformer(model_dir, CPU, FP8)
    checkpoint.unlink()
    with pytest.raises(ConfigurationError, match="has gone"):
        load_transformer(model_dir, CPU, FP8)


@pytest.mark.parametrize("method", ["torchao", "modelopt", "modelopt's own file"])
def test_a_directory_quantised_by_another_is_named(pico, tmp_path, method):
    folder = Path(shutil.copytree(pico, tmp_path / "model"))
    config = folder / "transformer" / "config.json"
    if method == "modelopt's own file":
        (config.parent / "hf_quant_config.json").write_text("{}")
    else:
        stated = {"quantization_config": {"quant_method": method}}
        config.write_text(json.dumps(json.loads(config.read_text()) | stated))
    with pytest.raises(ConfigurationError, match=method.split("'")[0]):
        resolve_model_dir(ModelSettings(path=str(folder)))


# The demo's, with its seed.
PROMPT = "a large red circle left of a small blue square"
SEED = 1


# The other scaled forms are these weights bit by bit, as tests above say.
@pytest.mark.parametrize("form", ["older", "cast", "e5m2", None])
def test_the_built_in_model_draws_what_is_asked_from_files(tmp_path, form):
    name = "stable-diffusion-3.5-fp8.safetensors"
    write_comfyui(BUILTIN, tmp_path / "models", name=name, form=form, all_in_one=form is None)
    model_dir = resolved(tmp_path / "models", name)
    spec = ModelSpec.from_directory(model_dir)
    assert spec.defaults == ModelSpec.from_directory(BUILTIN).defaults
    batches = PictureBatches(model_dir, "fp8", "cpu", rows=1)
    (picture,) = batches.make([PROMPT], [""], [SEED], PictureSettings.of(spec))
    verdict = check(picture, read_claims(PROMPT))
    assert verdict.all_right, verdict.seen
    shutil.rmtree(tmp_path / "models")
