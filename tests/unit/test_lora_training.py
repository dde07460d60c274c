"""The shape that a LoRA teaches, the file it is stored in, and the script that trains it."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from deployments.builtin import train_lora
from deployments.builtin.architecture import PICO, build_transformer
from deployments.builtin.held_out import HELD_OUT_TAUGHT_COLORS
from deployments.builtin.lora_branches import (
    ATTENTION,
    FEED_FORWARD,
    add_branches,
    load_branches,
    save_lora,
)
from deployments.builtin.pico import build_pico
from deployments.builtin.sample import Kind, Split
from deployments.builtin.taught import taught_example
from deployments.builtin.velocity_step import StepInput, velocity_loss
from deployments.builtin.vocabulary import SHAPES, TAUGHT_SHAPES, words
from deployments.builtin.world import check, read_claims
from tests.unit.builtin_pictures import blurred_and_noisy, examples, jpeg, pictures, wobbly

RANK = 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows() -> StepInput:
    generator = torch.Generator().manual_seed(1)
    _, _, encoder = build_pico()
    tokens = encoder.tokens(["a red bolt", "two blue bolts"])
    return StepInput(
        latents=torch.randn(2, 16, 8, 8, generator=generator),
        noise=torch.randn(2, 16, 8, 8, generator=generator),
        sigmas=torch.tensor([0.3, 0.8]),
        clip_ids=tokens.clip,
        t5_ids=tokens.t5,
    )


def test_branches_begin_at_nothing_and_are_all_that_learns(tmp_path: Path):
    torch.manual_seed(0)
    parts, _, _ = build_pico()
    plain = {name: tensor.clone() for name, tensor in parts.transformer.state_dict().items()}
    step = rows()
    before = velocity_loss(parts, step)
    parts.requires_grad_(False)
    branches = add_branches(parts.transformer, RANK)
    torch.testing.assert_close(velocity_loss(parts, step), before)
    sides = [side for branch in branches.values() for side in (branch.lora_A, branch.lora_B)]
    assert {name for name, p in parts.named_parameters() if p.requires_grad} == {
        f"transformer.{name}.{side}" for name in branches for side in ("lora_A", "lora_B")
    }
    optimizer = torch.optim.AdamW(sides, 1e-2)
    for _ in range(20):
        velocity_loss(parts, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    after = velocity_loss(parts, step)
    assert after < 0.95 * before
    assert all(bool(branch.lora_B.any()) for branch in branches.values())
    # What is stored is what was trained, up to float16.
    save_lora(tmp_path / "some.safetensors", branches)
    continued, _, _ = build_pico()
    load_branches(tmp_path / "some.safetensors", add_branches(continued.transformer, RANK))
    torch.testing.assert_close(velocity_loss(continued, step), after, rtol=2e-3, atol=0)
    for name, tensor in parts.transformer.state_dict().items():
        stem = name.replace(".linear.weight", ".weight").replace(".linear.bias", ".bias")
        if "lora_" not in name and stem in plain:
            assert torch.equal(tensor, plain[stem]), name


def test_the_file_has_diffusers_names_and_says_its_rank(tmp_path: Path):
    transformer = build_transformer(PICO)
    linears = {
        name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)
    }
    path = tmp_path / "new" / "some.safetensors"
    save_lora(path, add_branches(transformer, RANK, (*ATTENTION, *FEED_FORWARD)))
    stored = load_file(path)
    stems = {name.removeprefix("transformer.").partition(".lora_")[0] for name in stored}
    assert stems < linears
    assert {stem.split(".", 2)[2] for stem in stems} == {*ATTENTION, *FEED_FORWARD}
    assert stored.keys() == {f"transformer.{s}.lora_{x}.weight" for s in stems for x in "AB"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    with safe_open(path, framework="pt") as opened:
        adapter = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (RANK, RANK)


@pytest.mark.parametrize("kind", ["core", "hard", "terse"])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_taught_examples_are_read_and_found_as_they_are_meant(kind: Kind, split: Split):
    rng = random.Random(7)
    made = [taught_example(rng, "bolt", kind, split) for _ in range(20)]
    for example, picture in zip(made, pictures([e.scene for e in made]), strict=True):
        assert read_claims(example.prompt) == example.claims
        assert any(claim.shape == "bolt" for claim in example.claims.things)
        unseen = any(
            thing.shape == "bolt" and thing.color in HELD_OUT_TAUGHT_COLORS
            for thing in example.scene.things
        )
        assert unseen == (split == "held_out")
        assert check(picture, example.claims).all_right, example.prompt


def test_a_bolt_is_known_through_wear_and_is_no_other_shape():
    rng = random.Random(3)
    made = [taught_example(rng, "bolt", "core") for _ in range(30)]
    drawn = pictures([example.scene for example in made])
    for spoil in (blurred_and_noisy, jpeg, wobbly):
        right = [
            check(spoil(picture), example.claims).all_right
            for picture, example in zip(drawn, made, strict=True)
        ]
        assert sum(right) >= 29
    for picture, example in zip(drawn, made, strict=True):
        for other in SHAPES:
            asked = example.prompt.replace("bolt", other)
            if not any(claim.shape == other for claim in example.claims.things):
                assert not check(picture, read_claims(asked)).attributes["shape"]


def test_bolts_are_looked_for_only_where_one_is_asked_for():
    example = taught_example(random.Random(4), "bolt", "core")
    (picture,) = pictures([example.scene])
    assert any("bolt" in seen for seen in check(picture, example.claims).seen)
    assert not any("bolt" in seen for seen in check(picture, read_claims("a red star")).seen)


def test_no_other_shape_is_a_bolt():
    made = examples("core", 40, seed=5)
    for example, picture in zip(made, pictures([e.scene for e in made]), strict=True):
        first, *others = example.claims.things
        asked = replace(example.claims, things=(replace(first, shape="bolt"), *others))
        assert not check(picture, asked).attributes["shape"]


def test_taught_shapes_are_no_words_of_the_model():
    assert not {*TAUGHT_SHAPES} & {*words(), *SHAPES}


def test_the_script_trains_in_miniature(tmp_path: Path):
    train_lora.main(["--out", str(tmp_path), "--smoke", "--rank", "8", "--device", "cpu"])
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == [
        *("start", "pool_filled", "warmed_up", "flow", "flow", "flow", "trained", "look")
    ]
    stored = load_file(tmp_path / "bolt.safetensors")
    assert all(bool(tensor.any()) for tensor in stored.values())
