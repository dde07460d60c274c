"""Captions are read back to what they state, by a reader that shares no code with the writer."""

import json
import random
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.builtin.claims import WORD
from deployments.builtin.vocabulary import PUNCTUATION, WRITTEN_WORDS, words
from deployments.builtin.world import (
    Claims,
    Example,
    Kind,
    PromptError,
    RelationClaim,
    Split,
    ThingClaim,
    UnknownWordError,
    read_claims,
    sample_example,
)

KINDS: tuple[Kind, ...] = ("core", "hard", "terse", "word")
SPLITS: tuple[Split, ...] = ("train", "held_out")
FRAMES = ((256, 256), (224, 288), (288, 224), (192, 320), (320, 192))


def _captions(number: int, seed: int) -> Iterator[Example]:
    rng = random.Random(seed)
    for _ in range(number):
        kind, split = rng.choice(KINDS), rng.choice(SPLITS)
        yield sample_example(rng, kind, split, *rng.choice(FRAMES))


def test_what_is_written_is_read_back():
    for example in _captions(12_000, seed=1):
        assert read_claims(example.prompt) == example.claims, example.prompt


def test_every_word_is_in_the_vocabulary_and_every_word_of_it_is_used():
    known = set(words())
    used: set[str] = set()
    for example in _captions(20_000, seed=2):
        plain = re.sub(r'"[A-Z]{1,4}"', '"', example.prompt)
        tokens = re.findall(r"[a-z]+|\d+|[^\sa-z\d]", plain)
        assert known.issuperset(set(tokens) - set(PUNCTUATION)), example.prompt
        used |= set(tokens)
    assert known <= used


def test_phrasing_varies():
    prompts = {example.prompt for example in _captions(3000, seed=3)}
    assert len(prompts) > 2000


def test_claims_survive_json():
    for example in _captions(500, seed=4):
        assert Claims.from_json(json.loads(json.dumps(example.claims.to_json()))) == example.claims


@pytest.mark.parametrize(
    ("prompt", "claims"),
    [
        (
            "a large red circle left of a small blue square",
            Claims(
                (
                    ThingClaim(1, "circle", "red", "large"),
                    ThingClaim(1, "square", "blue", "small"),
                ),
                (RelationClaim(0, "left of", 1),),
            ),
        ),
        (
            "A green star in the Centre, a pink heart in the top-left corner.",
            Claims(
                (
                    ThingClaim(1, "star", "green", None, "center"),
                    ThingClaim(1, "heart", "pink", None, "top left"),
                )
            ),
        ),
        (
            'the word "cat" in blue over three gray moons with a light blue background',
            Claims(
                (
                    ThingClaim(1, WORD, "blue", text="CAT"),
                    ThingClaim(3, "moon", "gray"),
                ),
                (RelationClaim(0, "above", 1),),
                "light blue",
            ),
        ),
        (
            "in the top left a red ring, in the bottom right a white cross",
            Claims(
                (
                    ThingClaim(1, "ring", "red", None, "top left"),
                    ThingClaim(1, "cross", "white", None, "bottom right"),
                )
            ),
        ),
        (
            "from left to right: a red star, a blue star",
            Claims(
                (ThingClaim(1, "star", "red"), ThingClaim(1, "star", "blue")),
                (RelationClaim(0, "left of", 1),),
            ),
        ),
        ("red, text", Claims((ThingClaim(None, None, "red"), ThingClaim(None, WORD)))),
        ("white background", Claims(background="white")),
    ],
)
def test_typed_prompts_are_read(prompt, claims):
    assert read_claims(prompt) == claims


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a red elephant", "elephant"),
        ("a turquoise circle", "turquoise"),
        ("five red circles", "five"),
        ("a red circle @ the top", "@"),
        ("ein roter Kreis", "ein"),
    ],
)
def test_an_unknown_word_is_named(prompt, word):
    with pytest.raises(UnknownWordError, match=word) as caught:
        read_claims(prompt)
    assert caught.value.word == word
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "   ",
        "and",
        "a red",
        "a red blue circle",
        "a red circle left of",
        "in the center",
        'the word "ELEPHANT"',
        'the word "A1"',
        'the word "CAT',
        "a red circle on a white background on a black background",
        "a star left of above a circle",
    ],
)
def test_nonsense_of_known_words_is_refused(prompt):
    with pytest.raises(PromptError):
        read_claims(prompt)


def _read_or_reason(prompt: str) -> Claims | str:
    try:
        return read_claims(prompt)
    except PromptError as error:
        return error.reason


@settings(max_examples=300)
@given(st.lists(st.sampled_from((*words(), *PUNCTUATION, *WRITTEN_WORDS[:4])), max_size=12))
def test_any_order_of_known_words_is_read_or_refused_with_a_reason(tokens):
    claims = _read_or_reason(" ".join(tokens))
    assert claims
    if isinstance(claims, Claims):
        assert claims != Claims()
        for relation in claims.relations:
            assert 0 <= relation.subject < len(claims.things)
            assert 0 <= relation.object < len(claims.things)


@settings(max_examples=200)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(prompt):
    assert _read_or_reason(prompt)
