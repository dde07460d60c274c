"""What export writes must be small, FP8 where it says so, and readable by diffusers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from deployments.builtin.architecture import BUILTIN, build_parts, build_vae
from deployments.builtin.checkpoint import shards
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.dequantise import dequantised, dequantized_directory, read_weights
from deployments.builtin.export import write_model

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory):
    encoder = PromptEncoder.for_spec(BUILTIN)
    clip = encoder.clip
    parts = build_parts(BUILTIN, len(clip), len(encoder.t5), clip.bos_token_id, clip.eos_token_id)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    folder = tmp_path_factory.mktemp("builtin") / "model"
    write_model(folder, BUILTIN, parts, build_vae(BUILTIN, 1.3, 0.2), encoder)
    return folder, parts


def test_it_fits_the_repository(exported):
    folder, _ = exported
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 32_000_000
    assert all(size <= 15 * MIB for size in sizes.values())


def test_linear_weights_are_fp8_and_embedders_are_not(exported):
    folder, _ = exported
    transformer = read_weights(folder / "transformer")
    t5 = read_weights(folder / "text_encoder_3")
    for state, name in (
        (transformer, "transformer_blocks.0.attn.to_q.weight"),
        (transformer, "transformer_blocks.5.norm1_context.linear.weight"),
        (t5, "encoder.block.3.layer.1.DenseReluDense.wi_0.weight"),
    ):
        assert state[name].dtype == torch.float8_e4m3fn
        assert state[name + "_scale"].shape == state[name].shape[:1]
        assert state[name + "_scale"].dtype == torch.float32
    for name in ("proj_out.weight", "context_embedder.weight", "pos_embed.pos_embed"):
        assert transformer[name].dtype == torch.float16
    vae = read_weights(folder / "vae").values()
    assert {tensor.dtype for tensor in vae} == {torch.float16}


def test_the_index_names_every_tensor_once(exported):
    folder, _ = exported
    index = json.loads(
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    found: dict[str, str] = {}
    for path in (folder / "transformer").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "pt"
            found |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == found


def test_dequantised_weights_are_close_to_the_trained_ones(exported):
    folder, parts = exported
    for name in ("transformer", "text_encoder_3"):
        plain = dequantised(read_weights(folder / name), torch.float32)
        for key, value in getattr(parts, name).state_dict().items():
            if key not in plain:
                assert key == "encoder.embed_tokens.weight"  # tied to shared.weight
                continue
            error = (plain[key] - value).norm() / value.norm()
            assert error < 0.03, key


def test_the_plain_directory_holds_no_scales(exported, tmp_path: Path):
    folder, _ = exported
    plain = dequantized_directory(folder, tmp_path / "plain", torch.bfloat16)
    state = read_weights(plain / "transformer")
    assert not [name for name in state if name.endswith("_scale")]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert (plain / "tokenizer" / "vocab.json").exists()
    vae = json.loads((plain / "vae" / "config.json").read_text())
    assert (vae["scaling_factor"], vae["shift_factor"]) == (1.3, 0.2)


def test_writing_again_replaces_the_model(exported, tmp_path: Path):
    from deployments.builtin.pico import write_pico

    folder = write_pico(tmp_path / "m", seed=0)
    (folder / "stale").write_text("x")
    write_pico(folder, seed=1)
    assert not (folder / "stale").exists()


def test_a_tensor_larger_than_a_shard_is_refused():
    with pytest.raises(ValueError, match="more than a shard"):
        shards({"w": torch.zeros(100)}, limit=399)


def test_a_folder_without_weights_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        read_weights(tmp_path)
