"""Encoding prompts: warnings that say what was lost, and bits that do not depend on the company."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.builtin.pico import write_pico
from deployments.payloads import TextJob
from deployments.sd3.text import TextEncoders


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pico(tmp_path_factory.mktemp("model") / "pico", seed=0)


@pytest.fixture(scope="module")
def encoders(model_dir: Path) -> TextEncoders:
    return TextEncoders.load(model_dir, "cpu", "auto")


def same(text: str, length: int = 48) -> TextJob:
    return TextJob(text, text, text, length)


def test_a_prompt_that_fits_has_no_warning(encoders):
    assert encoders.encode([same("a red circle")])[0].warnings == ()


@pytest.mark.parametrize(("text", "seen"), [("", 1), ("a red circle", 4), ("red " * 90, 48)])
def test_the_tokens_that_t5_saw_are_counted(encoders, text, seen):
    assert encoders.encode([same(text)])[0].tokens == seen


def test_each_encoder_that_cut_says_what_it_lost(encoders):
    long = "a red circle above " * 20 + "a golden star"
    (encoded,) = encoders.encode([TextJob(long, "short", long, 30)])
    clip, t5 = encoded.warnings
    assert clip.startswith("CLIP-L takes 32 tokens")
    assert t5.startswith("T5 takes 30 tokens")
    assert "above" in clip


def test_the_quote_is_where_the_cut_was(encoders):
    texts = "a red circle " * 9 + "golden star"
    (encoded,) = encoders.encode([TextJob("a", "a", texts, 28)])
    assert encoded.warnings[0].endswith("it did not see: golden star")


@pytest.mark.parametrize("length", [1, 2, 48, 300])
def test_the_t5_length_is_the_requests(encoders, length):
    (encoded,) = encoders.encode([same("a red circle", length)])
    assert encoded.prompt_embeds.shape[0] == encoders.clip_length + length


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.text(max_size=60), st.sampled_from([8, 20])), min_size=1, max_size=5))
def test_any_text_encodes_the_same_bits_in_any_company(encoders, texts):
    jobs = [same(text, length) for text, length in texts]
    together = encoders.encode(jobs)
    for job, encoded in zip(jobs, together, strict=True):
        (alone,) = encoders.encode([job])
        assert np.array_equal(alone.prompt_embeds, encoded.prompt_embeds)
        assert np.array_equal(alone.pooled_prompt_embeds, encoded.pooled_prompt_embeds)
        assert alone.warnings == encoded.warnings


def test_a_batch_is_each_of_its_rows(model_dir):
    """What a GPU does: many rows a forward, here in float32 on the CPU."""
    encoders = TextEncoders.load(model_dir, "cpu", "fp32")
    jobs = [same("a red circle"), same("", 20), same("a blue square " * 30), same("a star", 20)]
    alone = encoders.encode(jobs)
    encoders.rows_per_forward = 8
    for one, other in zip(alone, encoders.encode(jobs), strict=True):
        np.testing.assert_allclose(one.prompt_embeds, other.prompt_embeds, atol=2e-5)
        np.testing.assert_allclose(one.pooled_prompt_embeds, other.pooled_prompt_embeds, atol=2e-5)
        assert one.warnings == other.warnings


def test_different_prompts_differ(encoders):
    red, blue = encoders.encode([same("a red circle"), same("a blue circle")])
    assert not np.array_equal(red.prompt_embeds, blue.prompt_embeds)
    assert not np.array_equal(red.pooled_prompt_embeds, blue.pooled_prompt_embeds)


def test_without_t5_its_tokens_are_zeros(model_dir, tmp_path):
    import json
    import shutil

    without = Path(shutil.copytree(model_dir, tmp_path / "without"))
    index = json.loads((without / "model_index.json").read_text())
    index["text_encoder_3"] = index["tokenizer_3"] = [None, None]
    (without / "model_index.json").write_text(json.dumps(index))
    encoders = TextEncoders.load(without, "cpu", "fp32")
    (encoded,) = encoders.encode([same("a red circle", 20)])
    assert encoded.prompt_embeds.shape[0] == encoders.clip_length + 20
    assert (encoded.prompt_embeds[encoders.clip_length :] == 0).all()
    assert (encoded.prompt_embeds[: encoders.clip_length] != 0).any()
