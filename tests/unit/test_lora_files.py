"""LoRA files: every spelling reads as the same LoRA, and whatever else it is is said in words."""

import json
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.sd3.lora_tensors import read_layers
from serve.checkpoints.lora_file import METADATA_KEY, LoraFile, read_lora
from serve.errors import InvalidRequest
from tests.unit.lora_files import (
    BASE,
    Tensors,
    deltas,
    diffusers_lora,
    original_lora,
    written,
)

PARTS = {
    "transformer": "transformer.",
    "clip_l": "text_encoder.",
    "clip_g": "text_encoder_2.",
    "t5": "text_encoder_3.",
}


def read(path: Path) -> LoraFile:
    return read_lora(path, "styles/ink", BASE)


def added(path: Path) -> Tensors:
    """What a file adds to each weight, as it is read."""
    file = read(path)
    found: Tensors = {}
    for part, prefix in PARTS.items():
        layers = read_layers(file, file.of(part))  # type: ignore[arg-type]
        found |= {prefix + name: layer.up @ layer.down for name, layer in layers.items()}
    return found


def same(ours: Tensors, expected: Tensors) -> bool:
    return set(ours) == set(expected) and all(
        torch.allclose(ours[name], expected[name], rtol=1e-5, atol=1e-5) for name in expected
    )


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    found: Tensors = {}
    for name, value in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = value
    return found


def peft(tensors: Tensors) -> Tensors:
    """As PEFT itself saves a transformer."""
    return {
        f"base_model.model.{name.removeprefix(TRANSFORMER)}" if TRANSFORMER in name else name: value
        for name, value in tensors.items()
    }


def one_trainer(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, value in tensors.items():
        if name.startswith(TRANSFORMER):
            module, _, end = name.removeprefix(TRANSFORMER).partition(".lora_")
            module, is_alpha, _ = module.partition(".alpha")
            ends = {"A.weight": ".lora_down.weight", "B.weight": ".lora_up.weight"}
            end = ".alpha" if is_alpha else ends[end]
            name = f"lora_transformer_{module.replace('.', '_')}{end}"
        found[name] = value
    return found


TRANSFORMER = "transformer."
SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "diffusers": lambda t: t,
    "lora.down": lambda t: renamed(t, (".lora_A.", ".lora.down."), (".lora_B.", ".lora.up.")),
    "lora_linear_layer": lambda t: renamed(
        t, (".lora_A.", ".lora_linear_layer.down."), (".lora_B.", ".lora_linear_layer.up.")
    ),
    "named adapter": lambda t: renamed(
        t, ("lora_A.weight", "lora_A.default.weight"), ("lora_B.weight", "lora_B.default.weight")
    ),
    "PEFT": peft,
    "kohya": original_lora,
    "ComfyUI": lambda t: original_lora(t, "diffusion_model.", flat=False),
    "original with model.": lambda t: original_lora(t, "model.diffusion_model.", flat=False),
    "OneTrainer": one_trainer,
}


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(tmp_path, spelling, alpha):
    tensors = diffusers_lora(4, alpha=alpha)
    path = written(tmp_path / "a.safetensors", SPELLINGS[spelling](tensors))
    expected = deltas(tensors, 1.0 if alpha is None else alpha / 4)
    assert same(added(path), expected)
    file = read(path)
    assert file.rank("transformer") == file.rank("clip_l", "clip_g", "t5") == 4


def test_query_key_and_value_trained_apart_and_stored_as_one_have_their_own_ranks(tmp_path):
    """As kohya-ss writes with split_qkv: ranks side by side below, a block diagonal above."""
    torch.manual_seed(0)
    downs, ups = torch.randn(3, 5, 64), torch.randn(3, 64, 5)
    name = "lora_unet_joint_blocks_1_context_block_attn_qkv"
    stored = {
        f"{name}.lora_down.weight": downs.flatten(0, 1),
        f"{name}.lora_up.weight": _block_diagonal(ups),
        f"{name}.alpha": torch.tensor(15.0),
    }
    file = read(written(tmp_path / "a.safetensors", stored))
    layers = read_layers(file, file.layers)
    for at, leaf in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        layer = layers[f"transformer_blocks.1.attn.{leaf}"]
        assert layer.down.shape == (5, 64)
        torch.testing.assert_close(layer.up @ layer.down, ups[at] @ downs[at])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alphas_and_matrices_of_each_dtype(tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in diffusers_lora(2, alpha=1.0).items()}
    exact = {name: value.float() for name, value in tensors.items()}
    assert same(added(written(tmp_path / "a.safetensors", tensors)), deltas(exact, 0.5))


def test_peft_configuration_in_the_metadata_states_the_scale(tmp_path):
    tensors = diffusers_lora(4)
    stated = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 2},
        "text_encoder.lora_alpha": 12,
        "text_encoder.use_rslora": True,
    }
    path = written(tmp_path / "a.safetensors", tensors, {METADATA_KEY: json.dumps(stated)})
    scales = {layer.module: layer.scale for layer in read(path).of("transformer")}
    assert scales["transformer_blocks.0.attn.to_q"] == 0.5
    assert scales["transformer_blocks.1.attn.to_q"] == 2.0
    assert {layer.scale for layer in read(path).of("clip_l")} == {6.0}
    assert {layer.scale for layer in read(path).of("clip_g")} == {1.0}


def _block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(3, blocks.shape[1], 3, blocks.shape[2])
    for at, block in enumerate(blocks):
        whole[at, :, at] = block
    return whole.flatten(0, 1).flatten(1, 2)


def one(name: str = "transformer_blocks.0.attn.to_q", rank: int = 4) -> Tensors:
    return {
        f"transformer.{name}.lora_A.weight": torch.randn(rank, 64),
        f"transformer.{name}.lora_B.weight": torch.randn(64, rank),
    }


A, B = one()
TO_Q = "lora_unet_joint_blocks_0_x_block_attn_qkv"
REFUSED: dict[str, tuple[Tensors, str]] = {
    "empty": ({}, "empty"),
    "no LoRA": ({"model.weight": torch.zeros(2)}, "'model.weight' that no LoRA has"),
    "DoRA": (one() | {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}, "DoRA"),
    "DoRA of kohya": (one() | {f"{TO_Q}.dora_scale": torch.ones(64)}, "DoRA"),
    "LoKr": ({f"{TO_Q}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
    "LoHa": ({f"{TO_Q}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    "OFT": ({f"{TO_Q}.oft_blocks": torch.ones(2, 2)}, "OFT"),
    "differences": ({f"{TO_Q}.diff": torch.ones(2, 2)}, "whole differences"),
    "biases": (one() | {B.replace("weight", "bias"): torch.ones(64)}, "biases"),
    "FLUX": (
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 64),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(64, 4),
        },
        "for FLUX",
    ),
    "FLUX of diffusers": (
        {
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 64),
            "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(64, 4),
        },
        "for FLUX",
    ),
    "SDXL": (
        {
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(4, 64),
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": torch.ones(64, 4),
        },
        "Stable Diffusion 1, 2 or XL",
    ),
    "Large": (
        {A: torch.ones(4, 2432), B: torch.ones(2432, 4)},
        r"\[4, 64\] was expected: it seems to be for Stable Diffusion 3.5 Large \(width 2432\)",
    ),
    "too many blocks": (one("transformer_blocks.7.attn.to_q"), "3 blocks of width 64"),
    "no such layer": (one("transformer_blocks.0.attn.to_x"), "adapts no layer of this model"),
    "only half": ({A: torch.ones(4, 64)}, "lacks its up matrix"),
    "only alpha": ({f"{TO_Q}.alpha": torch.ones(())}, "lacks its down matrix"),
    "ranks that differ": ({A: torch.ones(4, 64), B: torch.ones(64, 3)}, "no rank in common"),
    "rank 257": ({A: torch.ones(257, 64), B: torch.ones(64, 257)}, "from 1 to 256"),
    "rank 0": ({A: torch.ones(0, 64), B: torch.ones(64, 0)}, "a matrix was expected"),
    "wrong width": ({A: torch.ones(4, 60), B: torch.ones(64, 4)}, r"\[4, 60\]; \[4, 64\]"),
    "integers": ({A: torch.ones(4, 64).int(), B: torch.ones(64, 4).int()}, "dtype I32"),
    "a vector": ({A: torch.ones(64), B: torch.ones(64, 4)}, "a matrix was expected"),
    "alpha NaN": (one() | {A.replace("lora_A.weight", "alpha"): torch.tensor(torch.nan)}, "nan"),
    "alpha of many": (one() | {A.replace("lora_A.weight", "alpha"): torch.ones(3)}, "one number"),
    "alpha enormous": (
        one() | {A.replace("lora_A.weight", "alpha"): torch.tensor(1e9)},
        "the scale",
    ),
    "twice in one spelling": (
        one() | {A.replace("lora_A", "lora_down"): torch.ones(4, 64)},
        "two spellings",
    ),
    "twice in two spellings": (
        one()
        | {f"{TO_Q}.lora_down.weight": torch.ones(4, 64)}
        | {f"{TO_Q}.lora_up.weight": torch.ones(192, 4)},
        "adapt the same layer",
    ),
    "outside of the blocks": (
        {
            "transformer.context_embedder.lora_A.weight": torch.ones(4, 24),
            "transformer.context_embedder.lora_B.weight": torch.ones(64, 4),
        },
        "only layers of the blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_told_with_file_tensor_and_what_was_expected(tmp_path, kind):
    tensors, words = REFUSED[kind]
    path = written(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InvalidRequest, match=words) as raised:
        read(path)
    assert raised.value.message.startswith("LoRA 'styles/ink': ")
    assert (raised.value.field, raised.value.value) == ("loras", "styles/ink")
    assert str(tmp_path) not in raised.value.message


def test_metadata_that_is_no_configuration_is_refused(tmp_path):
    for stated, words in (
        ("{", "no JSON object"),
        ("[]", "no JSON object"),
        (json.dumps({"transformer.use_dora": True}), "DoRA"),
        (json.dumps({"transformer.lora_alpha": "much"}), "alpha 'much'"),
        (json.dumps({"transformer.lora_alpha": 10**400}), "alpha '1000"),
        (json.dumps({"transformer.alpha_pattern": {"attn.to_q": -(10**400)}}), "alpha '-1000"),
        (json.dumps({"transformer.alpha_pattern": {"to_q": float("nan")}}), "alpha 'nan'"),
    ):
        path = written(tmp_path / "a.safetensors", one(), {METADATA_KEY: stated})
        with pytest.raises(InvalidRequest, match=words):
            read(path)


def test_patterns_are_ends_of_names_and_a_header_full_of_them_is_read_at_once(tmp_path):
    patterns = {f"none{number}": 1 for number in range(50_000)} | {"attn.to_q": 8, "to_q": 16}
    stated = json.dumps({"transformer.alpha_pattern": {**patterns, "o_k": 32}})
    path = written(tmp_path / "a.safetensors", diffusers_lora(4), {METADATA_KEY: stated})
    began = time.process_time()
    layers = read(path).of("transformer")
    assert time.process_time() - began < 5  # tried one by one they take minutes
    scales = {layer.module.removeprefix("transformer_blocks.0."): layer.scale for layer in layers}
    assert scales["attn.to_q"] == 2.0
    assert scales["attn2.to_q"] == 4.0
    assert scales["attn.to_k"] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrices_with_nan_or_infinity_are_refused_when_they_are_read(tmp_path, value):
    tensors = one()
    tensors[B][3, 2] = value
    file = read(written(tmp_path / "a.safetensors", tensors))
    with pytest.raises(InvalidRequest, match=f"'{B}' holds NaN or infinite values"):
        read_layers(file, file.layers)


def test_a_file_cut_short_after_it_was_checked_ends_the_request_only(tmp_path):
    path = written(tmp_path / "a.safetensors", one())
    file = read(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InvalidRequest, match="cut short"):
        read_layers(file, file.layers)
    with pytest.raises(InvalidRequest, match="cut short"):
        read(path)
    path.unlink()
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_layers(file, file.layers)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(InvalidRequest, match="pickle"):
        read(path)


SMALL = {**diffusers_lora(2, alpha=1.0)}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_files_give_typed_errors_or_a_lora(tmp_path, data):
    path = written(tmp_path / "a.safetensors", dict(list(SMALL.items())[:12]))
    content = bytearray(path.read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    where = data.draw(st.sampled_from(["header", "anywhere", "cut", "longer"]))
    if where == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif where == "longer":
        content += bytes(data.draw(st.integers(1, 64)))
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            last = 8 + length if where == "header" else len(content)
            content[data.draw(st.integers(0, last - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(InvalidRequest):  # anything else fails the test
        file = read(path)
        read_layers(file, file.layers)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    modules=st.lists(
        st.sampled_from(sorted(BASE.shapes["transformer"])), min_size=1, max_size=6, unique=True
    ),
    rank=st.integers(1, 256),
    spelling=st.sampled_from(["diffusers", "lora.down", "named adapter", "OneTrainer"]),
    alpha=st.none() | st.floats(0.25, 64, width=32),
)
def test_any_layers_of_the_blocks_with_any_rank(tmp_path, modules, rank, spelling, alpha):
    tensors: Tensors = {}
    for module in modules:
        columns, inputs = BASE.shapes["transformer"][module]
        tensors[f"transformer.{module}.lora_A.weight"] = torch.ones(rank, inputs) / rank
        tensors[f"transformer.{module}.lora_B.weight"] = torch.ones(columns, rank)
        if alpha is not None:
            tensors[f"transformer.{module}.alpha"] = torch.tensor(alpha)
    path = written(tmp_path / "a.safetensors", SPELLINGS[spelling](tensors))
    if not all(module.startswith("transformer_blocks.") for module in modules):
        with pytest.raises(InvalidRequest, match="only layers of the blocks"):
            read(path)
        return
    scale = 1.0 if alpha is None else alpha / rank
    assert same(added(path), deltas(tensors, scale))
    assert read(path).rank("transformer") == rank
