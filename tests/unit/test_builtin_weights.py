"""The weights that are shipped: small, FP8 where they say so, and of the code that is beside them.

A change of the grammar or the architecture that needs another training shows here.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer, T5Tokenizer

import deployments.builtin
from deployments.builtin.architecture import BUILTIN, Parts, build_parts, build_vae
from deployments.builtin.conditioning import PromptEncoder
from deployments.builtin.dequantise import dequantised, dequantized_directory, read_weights
from deployments.builtin.export import kelvin_defaults
from loadtest.trials import held_out_prompts
from serve.models import ModelSpec

WEIGHTS = Path(deployments.builtin.__file__).parent / "weights"
MOST_BYTES = 32_000_000
MOST_SHARD_BYTES = 15 * 2**20


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder.for_spec(BUILTIN)


@pytest.fixture(scope="module")
def built(encoder: PromptEncoder) -> Parts:
    clip = encoder.clip
    return build_parts(BUILTIN, len(clip), len(encoder.t5), clip.bos_token_id, clip.eos_token_id)


def test_all_that_is_shipped_stays_small():
    sizes = {path: path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= MOST_BYTES
    assert max(sizes.values()) <= MOST_SHARD_BYTES
    assert not [path for path in sizes if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize(
    ("part", "prefix"),
    [("transformer", "transformer_blocks."), ("text_encoder_3", "encoder.block.")],
)
def test_every_linear_of_the_blocks_is_fp8_with_a_scale_a_row(built, part, prefix):
    state = read_weights(WEIGHTS / part)
    linears = [
        f"{name}.weight"
        for name, module in getattr(built, part).named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
    ]
    assert linears
    for name in linears:
        assert state[name].dtype == torch.float8_e4m3fn
        scale = state[f"{name}_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, state[name].shape[:1])
        assert bool((scale > 0).all() and scale.isfinite().all())
        # Each row uses the whole range, or the scale is not a row's own.
        assert bool((state[name].float().abs().amax(dim=1) >= 440).all())


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_the_other_parts_are_16_bit(part):
    assert {tensor.dtype for tensor in read_weights(WEIGHTS / part).values()} == {torch.float16}


def test_the_index_names_the_file_of_every_tensor():
    folder = WEIGHTS / "transformer"
    (path,) = folder.glob("*.index.json")
    listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    assert listed == found


def test_the_weights_fit_the_architecture_in_the_code(built):
    for part, module in (*built.named_children(), ("vae", build_vae(BUILTIN))):
        state = dequantised(read_weights(WEIGHTS / part), torch.float32)
        missing, unexpected = module.load_state_dict(state, strict=False)
        # What is shared is stored once, under one of its names.
        assert not unexpected
        assert set(missing) <= {"encoder.embed_tokens.weight"}
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())


def test_the_tokenizers_say_what_the_grammar_says(encoder):
    stored = {
        "tokenizer": (CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer"), encoder.clip),
        "tokenizer_2": (CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer_2"), encoder.clip),
        "tokenizer_3": (T5Tokenizer.from_pretrained(WEIGHTS / "tokenizer_3"), encoder.t5),
    }
    prompts = [example.prompt for _, example in held_out_prompts(100, 0, 256, 256)]
    for from_folder, from_code in stored.values():
        assert len(from_folder) == len(from_code)
        assert from_folder(prompts).input_ids == from_code(prompts).input_ids


def test_kelvin_json_is_what_the_code_writes_and_the_server_reads():
    written = json.loads((WEIGHTS / "kelvin.json").read_text(encoding="utf-8"))
    assert written == kelvin_defaults(BUILTIN)
    spec = ModelSpec.from_directory(WEIGHTS)
    assert spec.licence == "Apache-2.0"
    defaults = spec.defaults
    assert (defaults.width, defaults.height, defaults.num_inference_steps) == (256, 256, 20)
    assert (defaults.guidance_scale, defaults.max_sequence_length) == (4.0, 48)


def test_diffusers_loads_it_once_the_scales_are_multiplied_in(tmp_path):
    plain = dequantized_directory(WEIGHTS, tmp_path / "plain", torch.float16)
    pipeline = StableDiffusion3Pipeline.from_pretrained(plain, dtype=torch.float16)
    name = "transformer_blocks.0.attn.to_q.weight"
    stored = read_weights(WEIGHTS / "transformer")
    expected = stored[name].float() * stored[f"{name}_scale"][:, None]
    torch.testing.assert_close(
        pipeline.transformer.get_parameter(name).float(), expected, rtol=1e-3, atol=1e-6
    )


def test_a_card_and_pictures_lie_beside_them():
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n")
    for name, most in (("sheet.png", 150_000), ("sheet_60.png", 400_000), ("sample.png", 50_000)):
        assert name in card
        assert (WEIGHTS / name).stat().st_size <= most
        with Image.open(WEIGHTS / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**20) or ()) > 4
