"""Random examples: a scene, what is said of it, and in which words.

Four kinds. ``core``: one or two things. ``hard``: three or four things, counts, written words.
``terse``: a word or two that states little, because negative prompts are like that. ``word``: one
to four capitals, mostly at a stated place, to learn letters from. A draft that
does not fit its frame or its split is thrown away and drawn again.
"""

import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from deployments.builtin import compose, compose_spelled, compose_terse, compose_words
from deployments.builtin.caption import write
from deployments.builtin.compose import Composed, Draft
from deployments.builtin.held_out import HELD_OUT_WORDS, contains_held_out, states_held_out
from deployments.builtin.looks import NOTHING_FORCED, Forced, force_held_out
from deployments.builtin.scene import Example

Kind = Literal["core", "hard", "terse", "word"]
Split = Literal["train", "held_out"]


class _Sort(NamedTuple):
    share: float
    compose: Callable[[Draft], Composed | None]
    states: Literal["pair", "pair or triple", "word", "nothing"] = "pair"


_SORTS: dict[Kind, tuple[_Sort, ...]] = {
    "core": (
        _Sort(0.42, compose.one_thing),
        _Sort(0.28, compose.two_related, "pair or triple"),
        _Sort(0.30, compose.several_placed),
    ),
    "hard": (
        _Sort(0.28, compose.counted),
        _Sort(0.20, compose.in_a_row, "pair or triple"),
        _Sort(0.10, compose.related_to_two, "pair or triple"),
        _Sort(0.17, compose.several_placed),
        _Sort(0.25, compose_words.written, "word"),
    ),
    "terse": (
        _Sort(0.37, compose_terse.keywords),
        _Sort(0.38, compose_terse.bare_count),
        _Sort(0.10, compose_terse.only_background, "nothing"),
        _Sort(0.05, compose_words.some_text, "nothing"),
        _Sort(0.10, compose_words.bare_word, "word"),
    ),
    "word": (_Sort(1.0, compose_spelled.spelled, "word"),),
}
_MAXIMUM_TRIES = 1000


def sample_example(
    rng: random.Random,
    kind: Kind,
    split: Split = "train",
    height: int = 256,
    width: int = 256,
) -> Example:
    """One example of a kind; the same ``rng`` state gives the same example.

    A ``train`` example contains no held-out combination (``held_out``); a ``held_out`` example
    states at least one.

    Args:
        rng: source of all randomness.
        kind: "core", "hard", "terse" or "word".
        split: "train" or "held_out".
        height: frame height in pixels, a multiple of 16.
        width: frame width in pixels, a multiple of 16.

    Raises:
        KeyError: unknown kind.
        ValueError: nothing of this kind fits the frame.
    """
    sorts = _SORTS[kind]
    held_out = split == "held_out"
    for _ in range(_MAXIMUM_TRIES):
        point = rng.random()
        for sort in sorts:
            point -= sort.share
            if point < 0:
                break
        forced = NOTHING_FORCED
        if held_out:
            if sort.states == "nothing":
                continue
            if sort.states == "word":
                forced = Forced(word=rng.choice(HELD_OUT_WORDS))
            else:
                forced = force_held_out(rng, triples=sort.states == "pair or triple")
        composed = sort.compose(Draft(rng, kind, forced, held_out, height, width))
        if composed is None:
            continue
        scene, claims = composed
        if states_held_out(claims) if held_out else not contains_held_out(scene):
            return Example(scene, write(claims, rng), claims)
    raise ValueError(f"no {kind} scene fits a frame of {height}x{width}")
