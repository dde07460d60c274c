"""The LoRA that is shipped: with it the model draws the shape that it does not know without."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import deployments.builtin
from deployments.builtin.world import check, read_claims
from loadtest.picture_batches import PictureBatches, PictureSettings
from serve.checkpoints.lora_file import BaseModel, read_lora
from serve.models import ModelSpec

WEIGHTS = Path(deployments.builtin.__file__).parent / "weights"
LORA = WEIGHTS / "loras" / "bolt.safetensors"
PROMPTS = (
    "a large yellow bolt on a dark blue background",
    "a green bolt, a white background",
    "a small red bolt left of a large blue circle",
)
ORDINARY = "a large red circle left of a small blue square"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(batches: PictureBatches) -> list[bool]:
    """Whether the pictures of the prompts, and of an ordinary one, show all that they state."""
    settings = PictureSettings.of(ModelSpec.from_directory(WEIGHTS))
    prompts = [*PROMPTS, ORDINARY]
    made = batches.make(prompts, [""] * len(prompts), range(len(prompts)), settings)
    return [
        check(picture, read_claims(prompt)).all_right
        for picture, prompt in zip(made, prompts, strict=True)
    ]


def test_the_checker_finds_bolts_with_it_and_none_without():
    batches = PictureBatches(WEIGHTS, "bf16", "cpu", rows=4)
    *bolts, ordinary = drawn(batches)
    assert (sum(bolts), ordinary) == (0, True)
    batches.adapt(LORA)
    *bolts, ordinary = drawn(batches)
    assert all(bolts)  # three; the card says how often of two hundred
    assert ordinary


def test_diffusers_reads_it_and_all_of_it_belongs_to_the_model():
    state, metadata = StableDiffusion3Pipeline.lora_state_dict(LORA, return_lora_metadata=True)
    rank = metadata["transformer.r"]
    assert metadata["transformer.lora_alpha"] == rank
    assert all(rank in tensor.shape and bool(tensor.isfinite().all()) for tensor in state.values())
    file = read_lora(LORA, "bolt", BaseModel.of_folder(WEIGHTS))
    assert len(file.of("transformer")) == len(state) // 2
    assert file.rank("transformer") == rank
    assert {layer.scale for layer in file.of("transformer")} == {1.0}


def test_it_is_small_and_shown():
    assert LORA.stat().st_size < 2_000_000
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert "loras/bolt.png" in card
    with Image.open(LORA.with_suffix(".png")) as picture:
        assert len(picture.convert("RGB").getcolors(2**20) or ()) > 4
