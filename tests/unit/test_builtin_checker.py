"""The checker is the measure of prompt adherence, so it is measured itself.

True captions must be accepted and false ones rejected, each 99 times in 100 or more, for every
kind of scene, clean and mildly spoiled; then the cases that decide what "right" means.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from deployments.builtin.world import (
    Claims,
    Kind,
    RelationClaim,
    Scene,
    Thing,
    ThingClaim,
    Word,
    check,
    read_claims,
)
from tests.unit.builtin_pictures import (
    Picture,
    blurred_and_noisy,
    examples,
    falsify,
    jpeg,
    pictures,
    wobbly,
)

CATEGORIES = (
    "shape",
    "color",
    "size",
    "position",
    "relation",
    "count",
    "background",
    "word",
)
SPOILED: dict[str, Callable[[Picture], Picture]] = {
    "as drawn": lambda picture: picture,
    "blur and noise": blurred_and_noisy,
    "jpeg": jpeg,
}


def _picture(
    *things: Thing,
    background: str = "white",
    word: Word | None = None,
    height: int = 256,
    width: int = 256,
) -> Picture:
    return pictures([Scene(height, width, background, things, word)])[0]


@pytest.mark.parametrize("kind", ["core", "hard", "terse", "word"])
def test_true_captions_are_accepted(kind):
    drawn = [*examples(kind, 100, seed=11), *examples(kind, 40, 12, height=192, width=320)]
    seen = pictures([e.scene for e in drawn[:100]]) + pictures([e.scene for e in drawn[100:]])
    table: dict[str, Counter[tuple[str, bool]]] = defaultdict(Counter)
    accepted: Counter[str] = Counter()
    for name, spoil in SPOILED.items():
        for example, picture in zip(drawn, seen, strict=True):
            verdict = check(spoil(picture), example.claims)
            accepted[name] += verdict.all_right
            for category, right in verdict.attributes.items():
                table[name][category, right] += 1
    for name in SPOILED:
        assert accepted[name] >= 0.99 * len(drawn), (accepted, len(drawn), dict(table[name]))


def test_bent_outlines_are_accepted():
    drawn = examples("core", 100, seed=13)
    verdicts = [
        check(wobbly(picture), example.claims)
        for example, picture in zip(drawn, pictures([e.scene for e in drawn]), strict=True)
    ]
    wrong = [verdict for verdict in verdicts if not verdict.all_right]
    assert len(wrong) <= 0.03 * len(drawn), wrong


def test_false_captions_are_rejected():
    rng = random.Random(14)
    tried: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    missed = []
    kinds: tuple[Kind, Kind] = ("core", "hard")
    for kind in kinds:
        drawn = examples(kind, 160, seed=15)
        seen = pictures([e.scene for e in drawn])
        for spoil in (SPOILED["as drawn"], blurred_and_noisy):
            for example, picture in zip(drawn, seen, strict=True):
                spoiled = None
                # Four categories a picture keep the time down; every category gets hundreds.
                for category in rng.sample(CATEGORIES, 4):
                    claims = falsify(example, category, rng)
                    if claims is None:
                        continue
                    spoiled = spoil(picture) if spoiled is None else spoiled
                    tried[category] += 1
                    if check(spoiled, claims).all_right:
                        accepted[category] += 1
                        missed.append((category, example.prompt))
    for category in CATEGORIES:
        assert tried[category] >= 50, tried
        assert accepted[category] <= 0.01 * tried[category], (accepted, tried, missed)


def test_a_false_attribute_is_named():
    picture = _picture(Thing("star", "red", 50, 70, 70))
    wrong = {
        "shape": "a large red heart in the top left on a white background",
        "color": "a large blue star in the top left on a white background",
        "size": "a small red star in the top left on a white background",
        "position": "a large red star in the bottom right on a white background",
        "background": "a large red star in the top left on a gray background",
        "count": "two large red stars on a white background",
    }
    for category, prompt in wrong.items():
        attributes = check(picture, read_claims(prompt)).attributes
        assert not attributes[category], prompt
        if category != "count":
            assert sum(attributes.values()) == len(attributes) - 1, (prompt, attributes)


def test_a_circle_means_one_circle_and_circles_mean_some():
    two = _picture(Thing("circle", "red", 30, 60, 60), Thing("star", "blue", 30, 180, 180))
    assert not check(two, read_claims("a red circle")).all_right
    assert check(two, read_claims("red circle")).all_right
    assert check(two, read_claims("circles, blue")).all_right
    assert not check(two, read_claims("green")).all_right
    assert check(two, read_claims("two shapes")).all_right


def test_a_square_may_be_a_little_oblong_and_no_more():
    square = _picture(Thing("square", "green", 50, 128, 128))

    def stretched(factor: float) -> Picture:
        taller = Image.fromarray(square).resize((256, int(256 * factor)))
        return np.asarray(taller)[:256]

    assert check(stretched(49 / 41), read_claims("a green square")).all_right
    assert not check(stretched(1.5), read_claims("a green square")).all_right


def test_specks_are_overlooked_and_lumps_are_not():
    picture = _picture(Thing("heart", "pink", 45, 100, 100), background="dark blue").copy()
    picture[200:206, 30:36] = 255
    assert check(picture, read_claims("a pink heart")).all_right
    picture[200:216, 200:216] = 255
    assert check(picture, read_claims("a pink heart")).attributes == {
        "shape": True,
        "color": True,
        "count": False,
    }


def test_two_colours_in_one_shape_are_no_colour():
    picture = _picture(Thing("circle", "red", 50, 128, 128)).copy()
    blue = _picture(Thing("circle", "blue", 50, 128, 128))
    picture[:, 128:] = blue[:, 128:]
    assert not check(picture, read_claims("a red circle")).attributes["color"]
    assert not check(picture, read_claims("a blue circle")).attributes["color"]


def test_equal_things_are_told_apart_by_place():
    things = (
        Thing("ring", "red", 28, 50, 60),
        Thing("ring", "red", 28, 200, 60),
        Thing("moon", "red", 28, 128, 190),
    )
    claims = Claims(
        (ThingClaim(2, "ring", "red"), ThingClaim(1, "moon", "red")),
        (RelationClaim(0, "above", 1),),
    )
    assert check(_picture(*things), claims).all_right
    turned = Claims(claims.things, (RelationClaim(0, "below", 1),))
    assert check(_picture(*things), turned).attributes == {
        "shape": True,
        "color": True,
        "relation": False,
        "count": True,
    }


@pytest.mark.parametrize("text", ["OX", "QUIZ", "MOON", "IN", "BDPR", "WVMN"])
def test_words_are_read_letter_by_letter(text):
    picture = _picture(Thing("ring", "blue", 30, 128, 210), word=Word(text, "blue", 56, 128, 80))
    prompt = f'the word "{text}" in blue above a blue ring'
    assert check(picture, read_claims(prompt)).all_right
    for other in {text[::-1], "X" + text[1:], text[:-1] + "E"} - {text}:
        wrong = check(picture, read_claims(prompt.replace(text, other)))
        assert not wrong.attributes["word"], other
    assert check(picture, read_claims("letters")).all_right == (len(text) > 1)


def test_a_shape_is_not_text():
    picture = _picture(Thing("ring", "blue", 30, 70, 100), Thing("cross", "blue", 30, 170, 100))
    assert not check(picture, read_claims("text")).all_right


@pytest.mark.parametrize("prompt", ["a red circle", 'the word "CAT"', "red", "two stars, text"])
def test_empty_and_shattered_pictures_are_wrong(prompt):
    claims = read_claims(prompt)
    blank = np.full((256, 256, 3), 250, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    tiles = np.kron(noise[:16, :16], np.ones((16, 16, 1))).astype(np.uint8)
    assert not check(blank, claims).all_right
    if claims.exact:
        assert not check(noise, claims).all_right
        assert not check(tiles, claims).all_right


def test_only_rgb_bytes_are_looked_at():
    with pytest.raises(ValueError, match="uint8"):
        check(np.zeros((8, 8), np.uint8), Claims())
    with pytest.raises(ValueError, match="uint8"):
        check(np.zeros((8, 8, 3), np.float32), Claims())
