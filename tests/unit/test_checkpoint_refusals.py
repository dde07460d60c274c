"""What is no model that can be served is named, by the headers of its files alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from loadtest.sd35 import config
from serve.checkpoints.architecture import expected_shapes
from serve.commands.model_files import check_model
from serve.config import ModelSettings
from serve.errors import ConfigurationError
from tests.unit.header_files import (
    CLIP_L,
    NAME,
    T5,
    VAE,
    Shapes,
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


STRANGERS: dict[str, tuple[Shapes, str]] = {
    "flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "FLUX"),
    "flux 2": ({"single_stream_modulation.lin.weight": (8, 8)}, "FLUX.2"),
    "flux in diffusers' names": (
        {"single_transformer_blocks.0.norm.linear.weight": (8, 8)},
        "FLUX",
    ),
    "sdxl": (
        {
            "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
            "conditioner.embedders.1.model.ln_final.weight": (8,),
        },
        "Stable Diffusion XL",
    ),
    "sd1": ({"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "Stable Diffusion 1"),
    "lora": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "LoRA"),
    "kohya lora": ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 8)}, "LoRA"),
    "controlnet": ({"controlnet_blocks.0.weight": (8, 8)}, "ControlNet"),
    "vae": (expected_shapes("vae", VAE), "VAE alone"),
    "t5": (expected_shapes("t5", T5 | {"num_layers": 1}), "T5 text encoder alone"),
    "clip": (expected_shapes("clip_l", CLIP_L), "CLIP text encoder alone"),
    "something": ({"some.weight": (2, 2)}, "some.weight"),
    "nothing": ({}, "empty"),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_other_models_are_named(models_dir, what):
    shapes, said = STRANGERS[what]
    checkpoint(models_dir, shapes)
    with pytest.raises(ConfigurationError) as caught:
        found(models_dir)
    assert said in caught.value.message
    assert NAME in caught.value.message


def test_stable_diffusion_3_0_is_named(models_dir):
    shapes = expected_shapes("transformer", config("medium") | {"dual_attention_layers": ()})
    checkpoint(models_dir, original({n: s for n, s in shapes.items() if ".norm_" not in n}))
    with pytest.raises(ConfigurationError, match=r"Stable Diffusion 3\.0"):
        found(models_dir)


def test_missing_and_extra_tensors_are_counted_and_ten_are_named(models_dir):
    shapes = dict(large())
    kept = {name: shape for name, shape in shapes.items() if "mlp.fc1" not in name}
    checkpoint(models_dir, kept)
    with pytest.raises(ConfigurationError) as caught:
        found(models_dir)
    assert "lacks 150 tensors" in caught.value.message
    assert caught.value.message.count("'") == 20
    assert "and 140 more" in caught.value.message
    checkpoint(models_dir, shapes | {f"x.{n}": (2,) for n in range(12)})
    with pytest.raises(ConfigurationError, match=r"12 tensors: 'x\.0'.*and 2 more"):
        found(models_dir)


T5_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "narrow": ({"d_model": 2048, "num_heads": 32}, "width 2048"),
    "short": ({}, "lacks"),
    "v1.0": ({}, "T5 v1.0"),
}


@pytest.mark.parametrize("wrong", T5_WRONG)
def test_a_t5_that_does_not_match_is_named(models_dir, wrong):
    changes, said = T5_WRONG[wrong]
    encoders(models_dir, t5=False)
    shapes = expected_shapes("t5", T5 | changes)
    if wrong == "short":
        del shapes["encoder.block.3.layer.1.DenseReluDense.wo.weight"]
    if wrong == "v1.0":
        shapes = {name.replace("wi_0", "wi"): shape for name, shape in shapes.items()}
    file = models_dir / "text_encoders" / "t5xxl.safetensors"
    write_sparse(file, shapes, "F16")
    checkpoint(models_dir, large())
    with pytest.raises(ConfigurationError) as caught:
        found(models_dir)
    assert said in caught.value.message
    assert "t5xxl.safetensors" in caught.value.message


def test_a_truncated_t5_is_named(models_dir):
    encoders(models_dir, t5=False)
    file = models_dir / "text_encoders" / "t5xxl.safetensors"
    write_sparse(file, expected_shapes("t5", T5), "F16")
    with file.open("r+b") as stream:
        stream.truncate(1 << 20)
    checkpoint(models_dir, large())
    with pytest.raises(ConfigurationError, match=r"t5xxl\.safetensors is cut short"):
        found(models_dir)


@pytest.mark.parametrize("missing", ["clip_l", "clip_g", "vae", "tokenizer"])
def test_what_is_missing_is_named_with_the_file_to_get(models_dir, missing):
    encoders(models_dir, vae=missing != "vae")
    checkpoint(models_dir, large())
    if missing.startswith("clip"):
        (models_dir / "text_encoders" / f"{missing}.safetensors").unlink()
    if missing == "tokenizer":
        (models_dir / "tokenizers" / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigurationError) as caught:
        found(models_dir)
    assert missing in caught.value.message
    to_get = {"vae": "diffusion_pytorch_model", "tokenizer": "stable-diffusion-3.5-large"}
    assert to_get.get(missing, f"{missing}.safetensors") in (caught.value.allowed or "")


OTHERS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, str], str]] = {
    "torchao": ({"a._weight_qdata": (4, 4)}, {}, "torchao"),
    "torchao metadata": ({}, {"tensor_names": "[]"}, "torchao"),
    "modelopt": ({"joint_blocks.0.x_block.attn.qkv.weight_quantizer._amax": ()}, {}, "ModelOpt"),
    "bitsandbytes": ({"a.weight.quant_state.bitsandbytes__nf4": (4,)}, {}, "bitsandbytes"),
    "4 bit": ({"a.weight_scale_2": ()}, {}, "4 or 6 bit"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_quantisations_are_named(models_dir, what):
    extra, metadata, said = OTHERS[what]
    prefix = "model.diffusion_model."
    checkpoint(
        models_dir, {**large(), **{prefix + n: s for n, s in extra.items()}}, metadata=metadata
    )
    with pytest.raises(ConfigurationError, match=said):
        found(models_dir)


@pytest.mark.parametrize("form", ["nvfp4", None, ["float8_e4m3fn"], {"float8_e4m3fn": 1}, 8])
def test_a_layer_quantised_otherwise_is_named(models_dir, form):
    layer = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv"
    noted = json.dumps({"layers": {layer: {"format": form}}})
    checkpoint(models_dir, large(), metadata={"_quantization_metadata": noted})
    with pytest.raises(ConfigurationError) as caught:
        found(models_dir)
    assert f"quantised as {str(form)!r}" in caught.value.message


@pytest.mark.parametrize(
    ("dtype", "shape", "said"),
    [
        ("F8_E4M3", (3,), "has shape [3]; expected one value or [9728]"),
        ("BF16", (), "scales a weight in BF16"),
        ("F8_E5M2", (), "has dtype F8_E5M2"),
    ],
)
def test_a_scale_that_cannot_be_one_is_told_by_headers_alone(models_dir, dtype, shape, said):
    encoders(models_dir)
    scale = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight_scale"
    checkpoint(models_dir, {**large(), scale: shape}, dtype)
    (finding,) = check_model(ModelSettings(path=NAME, models_dir=str(models_dir)))
    assert finding.verdict == "failed"
    assert scale in finding.detail
    assert said in finding.detail


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("num_attention_heads", 1.5),
        ("num_attention_heads", True),
        ("eos_token_id", "x"),
        ("hidden_act", 3),
    ],
)
def test_hints_that_make_no_model_are_told_by_headers_alone(models_dir, name, value):
    encoders(models_dir)
    path = models_dir / "text_encoders" / "clip_l.safetensors"
    stated = {"kelvin.hints": json.dumps({"clip_l": {name: value}})}
    write_sparse(path, expected_shapes("clip_l", CLIP_L), "F16", stated)
    checkpoint(models_dir, large())
    with pytest.raises(ConfigurationError) as caught:
        found(models_dir)
    assert str(path) in caught.value.message
    assert str(value) in caught.value.message


def test_doctor_names_what_is_missing(models_dir):
    checkpoint(models_dir, large(), "F16")
    (finding,) = check_model(ModelSettings(path=NAME, models_dir=str(models_dir)))
    assert finding.verdict == "failed"
    assert "clip_l.safetensors" in finding.remedy
