"""Original key names: what is read is what diffusers' own converters make of the same file."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor

from deployments.sd3.stored_tensors import StoredTensors
from loadtest.checkpoint_formats import ENCODERS, VAE, original_transformer, original_vae
from loadtest.sd35 import empty_transformer
from serve.checkpoints.architecture import config_of, expected_shapes
from serve.checkpoints.checks import check_part
from serve.checkpoints.families import parts_in
from serve.checkpoints.key_names import PREFIXES, Kind
from serve.checkpoints.part import Part
from serve.checkpoints.tensor_files import TensorFiles

State = dict[str, Tensor]
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 24),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def random_state(module: torch.nn.Module) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=generator).half()
        for name, tensor in module.state_dict().items()
    }


def on_meta(make: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
    with torch.device("meta"):
        module: torch.nn.Module = make(*args, **kwargs)
    return module


def written(path: Path, state: State) -> TensorFiles:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return TensorFiles.of([path])


def read(files: TensorFiles, prefix: str, kind: Kind) -> State:
    with StoredTensors(Part.of(files, prefix, kind)) as stored:
        return {name: stored.read(name).clone() for name in stored.names()}


def assert_same(ours: State, theirs: State) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("size", ["tiny", "tiny-dual"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_transformer_is_what_diffusers_converts(tmp_path: Path, size: str, prefix: str):
    state = random_state(empty_transformer(size))
    original = {prefix + name: tensor for name, tensor in original_transformer(state).items()}
    files = written(tmp_path / "a.safetensors", original)
    assert parts_in(files) == {"transformer": prefix}
    ours = read(files, prefix, "transformer")
    assert_same(ours, convert_sd3_transformer_checkpoint_to_diffusers(dict(original)))
    assert_same(ours, state)


def test_names_that_are_diffusers_already_stay(tmp_path: Path):
    state = random_state(empty_transformer("tiny-dual"))
    files = written(tmp_path / "a.safetensors", state)
    assert_same(read(files, "", "transformer"), state)


@pytest.mark.parametrize("prefix", ["", VAE])
def test_the_vae_is_what_diffusers_converts(tmp_path: Path, prefix: str):
    state = random_state(on_meta(AutoencoderKL, **VAE_CONFIG))
    original = {prefix + name: tensor for name, tensor in original_vae(state).items()}
    files = written(tmp_path / "a.safetensors", original)
    assert parts_in(files) == {"vae": prefix}
    ours = read(files, prefix, "vae")
    assert_same(ours, convert_ldm_vae_checkpoint(dict(original), VAE_CONFIG))
    assert_same(ours, state)


def clip(width: int) -> torch.nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=8,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
    )
    return on_meta(transformers.CLIPTextModelWithProjection, config)


@pytest.mark.parametrize("projection", [True, False], ids=["projection", "no projection"])
def test_clip_l_is_what_diffusers_converts(tmp_path: Path, projection: bool):
    """Its pooled output is not projected, whatever the file holds: as ComfyUI and diffusers do."""
    state = random_state(clip(768))
    if not projection:
        del state["text_projection.weight"]
    prefix = ENCODERS["text_encoder"]
    original = {prefix + name: tensor for name, tensor in state.items()}
    files = written(tmp_path / "a.safetensors", original)
    theirs = convert_ldm_clip_checkpoint(dict(original), prefix)
    theirs["text_projection.weight"] = torch.eye(768).half()
    assert_same(read(files, parts_in(files)["clip_l"], "clip_l"), theirs)


def test_clip_g_is_what_diffusers_converts(tmp_path: Path):
    state = random_state(clip(64))
    prefix = ENCODERS["text_encoder_2"]
    original = {prefix + name: tensor for name, tensor in state.items()}
    original["text_encoders.clip_g.logit_scale"] = torch.ones(())
    files = written(tmp_path / "a.safetensors", original)
    ours = read(files, parts_in(files)["clip_g"], "clip_g")
    assert_same(ours, convert_ldm_clip_checkpoint(dict(original), prefix))


def test_t5_is_what_diffusers_converts(tmp_path: Path):
    config = transformers.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    state = random_state(on_meta(transformers.T5EncoderModel, config))
    prefix = ENCODERS["text_encoder_3"]
    original = {prefix + name: tensor for name, tensor in state.items()}
    files = written(tmp_path / "a.safetensors", original)
    ours = read(files, parts_in(files)["t5"], "t5")
    assert_same(ours, convert_sd3_t5_checkpoint_to_diffusers(dict(original)))
    part = Part.of(files, prefix, "t5")
    check_part(part, config_of(part))


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("size", ["large", "medium", "tiny-dual"])
def test_the_transformer_s_tensors_are_those_of_diffusers_class(size: str):
    model = empty_transformer(size)
    assert expected_shapes("transformer", dict(model.config)) == shapes_of(model)


def test_the_encoders_and_the_vae_s_tensors_are_those_of_their_classes():
    vae = on_meta(AutoencoderKL, **VAE_CONFIG)
    assert expected_shapes("vae", VAE_CONFIG) == shapes_of(vae)
    model: Any = clip(64)
    assert expected_shapes("clip_g", model.config.to_dict()) == shapes_of(model)


def test_the_configuration_read_off_builds_the_same_transformer(tmp_path: Path):
    model = empty_transformer("tiny-dual")
    original = original_transformer(random_state(model))
    files = written(tmp_path / "a.safetensors", original)
    config = config_of(Part.of(files, "", "transformer"))
    again = on_meta(SD3Transformer2DModel.from_config, config)
    assert shapes_of(again) == shapes_of(model)
    for name in ("num_attention_heads", "dual_attention_layers", "patch_size", "out_channels"):
        expected = model.config[name]
        assert config[name] == (list(expected) if isinstance(expected, tuple) else expected)


def test_every_part_has_prefixes_of_its_own():
    every = [prefix for prefixes in PREFIXES.values() for prefix in prefixes]
    assert len(every) == len(set(every))
