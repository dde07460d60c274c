"""pico must be a real model directory, the same for the same seed, and cheap to make."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from deployments.builtin.dequantise import dequantized_directory
from deployments.builtin.pico import write_pico


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_equal_seeds_write_equal_weights_and_others_do_not(tmp_path: Path):
    first = _bytes(write_pico(tmp_path / "a", seed=3))
    assert first == _bytes(write_pico(tmp_path / "b", seed=3))
    assert first != _bytes(write_pico(tmp_path / "c", seed=4))


def test_it_leaves_the_callers_random_numbers_alone(tmp_path: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    write_pico(tmp_path / "pico")
    assert torch.equal(torch.rand(3), expected)


def test_its_defaults_say_how_to_ask_it(tmp_path: Path):
    defaults = json.loads((write_pico(tmp_path / "pico") / "kelvin.json").read_text())
    assert defaults["name"] == "pico"
    assert (defaults["min_size"], defaults["max_size"]) == (64, 256)
    assert defaults["max_sequence_length"] == 48


def test_no_weight_is_idle(tmp_path: Path):
    folder = write_pico(tmp_path / "pico")
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, tensor in state.items():
        assert tensor.float().abs().max() > 0, name


@pytest.mark.parametrize("size", [(64, 64), (256, 128)])
def test_prompts_and_sizes_change_its_pictures(tmp_path: Path, size: tuple[int, int]):
    plain = dequantized_directory(write_pico(tmp_path / "f"), tmp_path / "p", torch.float32)
    pipeline = StableDiffusion3Pipeline.from_pretrained(plain, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def picture(prompt: str) -> torch.Tensor:
        images: torch.Tensor = pipeline(
            prompt,
            height=size[0],
            width=size[1],
            num_inference_steps=2,
            max_sequence_length=48,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        return images

    red = picture("a red circle")
    assert red.shape == (1, 3, *size)
    assert red.isfinite().all()
    assert not torch.equal(red, picture("a blue square"))
