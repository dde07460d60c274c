"""A model of random weights on disk is one that Kelvin and diffusers load."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from deployments.payloads import TextJob
from deployments.sd3.precision import choose_precision
from deployments.sd3.text import TextEncoders
from loadtest.peer_pipelines import call
from loadtest.peer_settings import PictureAsked
from loadtest.random_model import write_random_model
from serve.models import ModelSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "model"
    write_random_model(folder, "tiny", torch.device("cpu"))
    return folder


def test_it_says_what_it_is(folder):
    spec = ModelSpec.from_directory(folder)
    assert spec.name == "random-tiny"
    assert "nobody trained" in spec.licence
    assert spec.defaults.max_sequence_length == 256


def test_diffusers_makes_a_picture_of_it(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, torch_dtype=torch.bfloat16, local_files_only=True
    )
    [picture] = call(pipeline, [PictureAsked("a lighthouse", 1, 64, 2, max_sequence_length=32)])
    assert picture.shape == (64, 64, 3)


def test_prompts_that_differ_do_so_for_the_encoders(folder):
    text = TextEncoders.load(
        folder, torch.device("cpu"), choose_precision("bf16", torch.device("cpu"))
    )
    one, other = text.encode([TextJob(words, words, words, 32) for words in ("a cat", "a dog")])
    assert (one.pooled_prompt_embeds != other.pooled_prompt_embeds).any()
    assert (one.prompt_embeds != other.prompt_embeds).any()


def test_what_is_there_stays(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    write_random_model(folder, "tiny", torch.device("cpu"), seed=1)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert before == after
