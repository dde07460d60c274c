"""What files are, told by their headers alone: real sizes, without a byte of weights."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadtest.sd35 import config
from serve.checkpoints.architecture import expected_shapes
from serve.checkpoints.header import ITEM_BITS, read_header
from serve.checkpoints.model_files import ModelFiles, find_model
from serve.commands.model_files import check_model
from serve.config import ModelSettings
from serve.errors import ConfigurationError
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]
NAME = "some-checkpoint.safetensors"

CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}
CLIP_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
}
T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "latent_channels": 16,
    "layers_per_block": 2,
}


def write_sparse(
    path: Path, shapes: Shapes, dtype: str | None = "BF16", metadata: Mapping[str, str] = {}
) -> Path:
    """Write a header and a hole of the size of the tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at = 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, shape in shapes.items():
        size = ITEM_BITS[dtype or "F16"] // 8
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
    return path


def original(shapes: Shapes, prefix: str = "model.diffusion_model.") -> dict[str, tuple[int, ...]]:
    """Fuse and rename a transformer's shapes by hand: qkv, and the names that tell sizes."""
    renamed = {}
    pairs = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj.": "x_embedder.proj.",
        "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
        "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
        "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
        "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
        "norm_out.linear.": "final_layer.adaLN_modulation.1.",
        "proj_out.": "final_layer.linear.",
        ".attn.to_q.": ".x_block.attn.qkv.",
        ".attn2.to_q.": ".x_block.attn2.qkv.",
        ".attn.add_q_proj.": ".context_block.attn.qkv.",
        ".attn.to_out.0.": ".x_block.attn.proj.",
        ".attn2.to_out.0.": ".x_block.attn2.proj.",
        ".attn.to_add_out.": ".context_block.attn.proj.",
        ".attn.norm_added_": ".context_block.attn.ln_",
        ".attn.norm_": ".x_block.attn.ln_",
        ".attn2.norm_": ".x_block.attn2.ln_",
        ".norm1.linear.": ".x_block.adaLN_modulation.1.",
        ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
        ".ff.net.0.proj.": ".x_block.mlp.fc1.",
        ".ff.net.2.": ".x_block.mlp.fc2.",
        ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
        ".ff_context.net.2.": ".context_block.mlp.fc2.",
    }
    for name, shape in shapes.items():
        if any(part in name for part in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
            continue
        for ours, theirs in pairs.items():
            if ours in name:
                name = name.replace(ours, theirs)
                break
        if ".qkv." in name:
            shape = (3 * shape[0], *shape[1:])
        renamed[prefix + name.replace("transformer_blocks.", "joint_blocks.")] = shape
    return renamed


def encoders(models_dir: Path, *, t5: bool = True, vae: bool = True) -> None:
    folder = models_dir / "text_encoders"
    write_sparse(folder / "clip_l.safetensors", expected_shapes("clip_l", CLIP_L), "F16")
    write_sparse(folder / "clip_g.safetensors", expected_shapes("clip_g", CLIP_G), "F16")
    if t5:
        shapes = expected_shapes("t5", T5)
        write_sparse(folder / "t5xxl_fp16.safetensors", shapes, "F16")
        write_sparse(folder / "t5xxl_fp8_e4m3fn.safetensors", shapes, "F8_E4M3")
    if vae:
        write_sparse(models_dir / "vae" / "sd3.safetensors", expected_shapes("vae", VAE))


def tokenizers(folder: Path) -> Path:
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "vocab.json").write_text(json.dumps({f"t{n}": n for n in range(49408)}))
        (folder / name / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "spiece.model").write_bytes(b"a model")
    (folder / "tokenizer_3" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    return folder


@pytest.fixture
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    tokenizers(tmp_path / "models" / "tokenizers")
    return tmp_path / "models"


def large(**changes: Any) -> Shapes:
    return original(expected_shapes("transformer", config("large") | changes))


def found(models_dir: Path, name: str = NAME, **fields: Any) -> ModelFiles:
    return find_model(ModelSettings(path=name, models_dir=str(models_dir), **fields))


def checkpoint(models_dir: Path, shapes: Shapes, dtype: str = "BF16", **how: Any) -> Path:
    return write_sparse(models_dir / "checkpoints" / NAME, shapes, dtype, **how)


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
    "name", ["../secret.safetensors", "a/../../secret.safetensors", "a\\b.safetensors"]
)
def test_a_name_does_not_leave_the_models_folder(models_dir, name):
    write_sparse(models_dir.parent / "secret.safetensors", large())
    with pytest.raises(ConfigurationError, match="would leave"):
        found(models_dir, name)


def test_a_link_does_not_leave_the_models_folder(models_dir, tmp_path):
    outside = write_sparse(tmp_path / "outside" / NAME, large())
    (models_dir / "checkpoints").mkdir()
    (models_dir / "checkpoints" / NAME).symlink_to(outside)
    with pytest.raises(ConfigurationError, match="link out of the models folder"):
        found(models_dir)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_encoders_that_are_links_out_are_not_read_and_the_refusal_says_so(
    models_dir, tmp_path, whole_folder
):
    checkpoint(models_dir, large())
    encoders(models_dir)
    folder, elsewhere = models_dir / "text_encoders", tmp_path / "elsewhere"
    folder.rename(elsewhere)
    if whole_folder:
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        for file in elsewhere.iterdir():
            (folder / file.name).symlink_to(file)
    with pytest.raises(ConfigurationError, match=r"has no clip_l, .*leads out of it"):
        found(models_dir)


def test_a_folder_of_checkpoints_is_no_model_and_its_files_are_named(models_dir):
    checkpoint(models_dir, large())
    with pytest.raises(ConfigurationError, match=r"no model_index\.json") as raised:
        resolve_model_dir(ModelSettings(path=str(models_dir / "checkpoints")))
    assert NAME in str(raised.value.allowed)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused(models_dir, suffix):
    (models_dir / "checkpoints").mkdir()
    (models_dir / "checkpoints" / f"a{suffix}").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ConfigurationError, match="pickle"):
        found(models_dir, f"a{suffix}")


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


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / NAME)
    with pytest.raises(ConfigurationError, match="is no regular file"):
        read_header(tmp_path / NAME)


def test_a_pickle_under_another_name_is_refused(models_dir):
    (models_dir / "checkpoints").mkdir()
    (models_dir / "checkpoints" / NAME).write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ConfigurationError, match="pickle"):
        found(models_dir)


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


def test_doctor_names_what_is_missing(models_dir):
    checkpoint(models_dir, large(), "F16")
    (finding,) = check_model(ModelSettings(path=NAME, models_dir=str(models_dir)))
    assert finding.verdict == "failed"
    assert "clip_l.safetensors" in finding.remedy
