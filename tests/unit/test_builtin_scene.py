"""Scenes keep their promises: room between things, contrast, a clean split, the same pictures."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from deployments.builtin.geometry import position_holds, relation_holds
from deployments.builtin.held_out import (
    HELD_OUT_PAIRS,
    HELD_OUT_TRIPLES,
    HELD_OUT_WORDS,
    contains_held_out,
    states_held_out,
)
from deployments.builtin.palette import BACKGROUND_RGB, COLOR_RGB, lab_distance
from deployments.builtin.scene import frame_scale, word_half_extents
from deployments.builtin.vocabulary import COLORS, SHAPES
from deployments.builtin.world import (
    Example,
    Kind,
    Scene,
    Split,
    Thing,
    Word,
    draw,
    sample_example,
)

FRAMES = ((256, 256), (224, 288), (288, 224), (192, 320), (320, 192), (512, 512))
KINDS: tuple[Kind, ...] = ("core", "hard", "terse", "word")


BOTH: tuple[Split, ...] = ("train", "held_out")


def _examples(number: int, seed: int, splits: tuple[Split, ...] = BOTH) -> Iterator[Example]:
    rng = random.Random(seed)
    for _ in range(number):
        yield sample_example(rng, rng.choice(KINDS), rng.choice(splits), *rng.choice(FRAMES))


def _boxes(scene: Scene) -> list[tuple[float, float, float, float]]:
    boxes = [(t.center_x, t.center_y, t.half_width_px, t.half_width_px) for t in scene.things]
    if scene.word is not None:
        word = scene.word
        extents = word_half_extents(len(word.text), word.letter_height_px)
        boxes.append((word.center_x, word.center_y, *extents))
    return boxes


def test_things_keep_apart_and_inside_the_frame():
    for example in _examples(3000, seed=1):
        scene = example.scene
        boxes = _boxes(scene)
        for x, y, half_x, half_y in boxes:
            assert half_x + 5 <= x <= scene.width - half_x - 5
            assert half_y + 5 <= y <= scene.height - half_y - 5
        for (x0, y0, w0, h0), (x1, y1, w1, h1) in itertools.combinations(boxes, 2):
            assert abs(x0 - x1) - w0 - w1 >= 8 or abs(y0 - y1) - h0 - h1 >= 8


def test_sizes_are_far_apart_and_never_tiny():
    for example in _examples(3000, seed=2):
        scene, scale = example.scene, frame_scale(example.scene.height, example.scene.width)
        assert all(thing.half_width_px >= 23.9 * scale for thing in scene.things)
        if scene.word is not None:
            assert scene.word.letter_height_px >= 40
        if len(example.claims.things) == 1 == len(scene.things):
            size = example.claims.things[0].size
            if size is not None:
                (thing,) = scene.things
                assert (thing.half_width_px < 31 * scale) == (size == "small")
                assert (thing.half_width_px > 43 * scale) == (size == "large")


def test_colours_stand_apart_and_off_their_background():
    for first, second in itertools.combinations(COLOR_RGB.values(), 2):
        assert lab_distance(first, second) > 32
    for example in _examples(1000, seed=3):
        ground = BACKGROUND_RGB[example.scene.background]
        colors = [thing.color for thing in example.scene.things]
        if example.scene.word is not None:
            colors.append(example.scene.word.color)
        assert all(lab_distance(COLOR_RGB[color], ground) > 40 for color in colors)


def test_stated_positions_and_relations_are_drawn():
    stated = 0
    for example in _examples(3000, seed=4):
        scene, claims = example.scene, example.claims
        if scene.word is not None or len(claims.things) != len(scene.things) or not claims.exact:
            continue
        for claim, thing in zip(claims.things, scene.things, strict=True):
            assert claim.shape in (None, thing.shape)
            assert claim.color in (None, thing.color)
            if claim.position is not None:
                stated += 1
                x, y = thing.center_x / scene.width, thing.center_y / scene.height
                assert position_holds(claim.position, x, y), example
        for relation in claims.relations:
            stated += 1
            first, second = scene.things[relation.subject], scene.things[relation.object]
            offset = (second.center_x - first.center_x, second.center_y - first.center_y)
            assert relation_holds(relation.relation, *offset, 1.0), example
    assert stated > 1000


def test_train_never_contains_and_held_out_always_states_a_held_out_combination():
    for example in _examples(4000, seed=5, splits=("train",)):
        scene = example.scene
        assert not any((t.shape, t.color) in HELD_OUT_PAIRS for t in scene.things)
        assert scene.word is None or scene.word.text not in HELD_OUT_WORDS
        for first, second in itertools.permutations(scene.things, 2):
            offset = (second.center_x - first.center_x, second.center_y - first.center_y)
            scale = frame_scale(scene.height, scene.width)
            for relation in ("left of", "above"):
                if (first.shape, relation, second.shape) in HELD_OUT_TRIPLES:
                    assert not relation_holds(relation, *offset, scale)
        assert not states_held_out(example.claims)
    for example in _examples(1500, seed=6, splits=("held_out",)):
        assert states_held_out(example.claims)
        assert contains_held_out(example.scene)


def test_held_out_combinations_are_spread_and_an_eighth():
    assert {color for _, color in HELD_OUT_PAIRS} == set(COLORS)
    assert {shape for shape, _ in HELD_OUT_PAIRS} == set(SHAPES)
    assert 0.10 <= len(HELD_OUT_PAIRS) / (len(SHAPES) * len(COLORS)) <= 0.14
    assert {first for first, _, _ in HELD_OUT_TRIPLES} == set(SHAPES)
    assert {second for _, _, second in HELD_OUT_TRIPLES} == set(SHAPES)
    assert all(first != second for first, _, second in HELD_OUT_TRIPLES)


def test_the_same_seed_gives_the_same_examples():
    assert list(_examples(200, seed=7)) == list(_examples(200, seed=7))


def test_a_frame_too_small_is_refused():
    with pytest.raises(ValueError, match="fits"):
        sample_example(random.Random(0), "hard", height=16, width=16)


def test_a_batch_is_drawn_as_its_scenes_are_alone():
    rng = random.Random(8)
    scenes = [sample_example(rng, kind).scene for kind in KINDS for _ in range(8)]
    together = draw(scenes)
    assert together.dtype == torch.uint8
    assert together.shape == (8 * len(KINDS), 3, 256, 256)
    for scene, picture in zip(scenes, together, strict=True):
        assert torch.equal(draw([scene])[0], picture)


def test_flat_colours_are_exact_and_areas_as_computed():
    scene = Scene(
        256,
        320,
        "light blue",
        (Thing("square", "red", 50, 80.5, 100.0), Thing("ring", "blue", 40, 240.0, 128.0)),
    )
    picture = draw([scene])[0].permute(1, 2, 0)
    assert tuple(picture[0, 0].tolist()) == BACKGROUND_RGB["light blue"]
    assert tuple(picture[100, 80].tolist()) == COLOR_RGB["red"]
    assert tuple(picture[128, 240].tolist()) == BACKGROUND_RGB["light blue"]
    assert tuple(picture[128, 240 + 30].tolist()) == COLOR_RGB["blue"]
    red = (picture == torch.tensor(COLOR_RGB["red"], dtype=torch.uint8)).all(-1).sum().item()
    assert abs(red - 90 * 90) < 2 * 90


def test_letters_are_drawn_where_the_word_is():
    scene = Scene(128, 256, "white", (), Word("HI", "black", 60, 128, 64))
    dark = draw([scene])[0].sum(0) < 300
    rows, columns = torch.nonzero(dark.any(1)).flatten(), torch.nonzero(dark.any(0)).flatten()
    assert rows.min().item() in range(33, 36)
    assert rows.max().item() in range(92, 95)
    half_width, _ = word_half_extents(2, 60)
    assert abs(columns.min().item() - (128 - half_width)) <= 1


def test_mixed_frames_and_no_scenes_are_refused():
    with pytest.raises(ValueError, match="one height and width"):
        draw([])
    with pytest.raises(ValueError, match="one height and width"):
        draw([Scene(256, 256, "white", ()), Scene(256, 320, "white", ())])
