"""What a Diffusers directory states of itself: what makes no model is named, and nothing is built.

Counts that are absurd used to be believed: a billion layers took all memory of the machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deployments.sd3.tokens import PromptTokenizer
from serve.checkpoints.stated_config import class_in
from serve.commands.model_files import check_model
from serve.config import ModelSettings
from serve.errors import ConfigurationError
from serve.model_dir import resolve_model_dir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory of its own with pico in it."""
    return Path(shutil.copytree(resolve_model_dir(ModelSettings(path="pico")), tmp_path / "model"))


def state(file: Path, name: str, value: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("transformer", "num_layers", 10**9),
        ("transformer", "num_layers", "2"),
        ("transformer", "num_layers", True),
        ("transformer", "num_attention_heads", None),
        ("transformer", "patch_size", 0),
        ("transformer", "pos_embed_max_size", 10**9),
        ("transformer", "sample_size", float("inf")),
        ("transformer", "in_channels", float("nan")),
        ("transformer", "dual_attention_layers", 5),
        ("transformer", "dual_attention_layers", ["a"]),
        ("transformer", "quantization_config", "fp4"),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder_2", "hidden_size", {}),
        ("text_encoder_3", "num_layers", 10**9),
        ("vae", "block_out_channels", []),
        ("vae", "block_out_channels", 5),
        ("vae", "layers_per_block", 10**9),
        ("vae", "scaling_factor", 0),
        ("vae", "shift_factor", "x"),
    ],
)
def test_a_configuration_that_makes_no_model_is_named_before_anything_is_built(
    folder: Path, part: str, name: str, value: Any
):
    state(folder / part / "config.json", name, value)
    settings = ModelSettings(path=str(folder))
    with pytest.raises(ConfigurationError) as refused:
        resolve_model_dir(settings)
    assert part in refused.value.message
    assert refused.value.allowed
    (finding,) = check_model(settings)
    assert finding.verdict == "failed"


@pytest.mark.parametrize("entry", [5, True, "abc", {"a": 1}, ["transformers"], [[], []]])
def test_an_index_that_names_no_class_is_refused(folder: Path, entry: Any):
    state(folder / "model_index.json", "text_encoder_3", entry)
    (finding,) = check_model(ModelSettings(path=str(folder)))
    assert finding.verdict == "failed"
    assert "text_encoder_3" in finding.detail
    state(folder / "model_index.json", "tokenizer", entry)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        PromptTokenizer.load(folder, "tokenizer", "CLIP-L")


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_an_index_may_leave_a_component_out(folder: Path, entry: Any):
    state(folder / "model_index.json", "text_encoder_3", entry)
    assert class_in(folder / "model_index.json", "text_encoder_3") is None
    assert class_in(folder / "model_index.json", "text_encoder") == "CLIPTextModelWithProjection"


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"largest_side": Infinity}',
        "{",
        "[]",
        r'{"name": "\ud800"}',
        r'{"license": "\ud800"}',
    ],
)
def test_defaults_that_cannot_be_read_are_a_failed_check_and_no_traceback(
    folder: Path, content: str
):
    (folder / "kelvin.json").write_text(content)
    (finding,) = check_model(ModelSettings(path=str(folder)))
    assert finding.verdict == "failed"
