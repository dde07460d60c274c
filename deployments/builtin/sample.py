"""Random examples: a scene, what is said of it, and in which words.

Three kinds. ``core``: one or two things. ``hard``: three or four things, counts, written words.
``terse``: a word or two that states little, because negative prompts are like that. A draft that
does not fit its frame or its split is thrown away and drawn again.
"""

import random
from collections.abc import Callable
from typing import Literal

from deployments.builtin import compose
from deployments.builtin.caption import write
from deployments.builtin.held_out import HELD_OUT_WORDS, contains_held_out, states_held_out
from deployments.builtin.looks import NOTHING_FORCED, Forced, force_held_out
from deployments.builtin.scene import Example

Kind = Literal["core", "hard", "terse"]
Split = Literal["train", "held_out"]

_Composer = Callable[[compose.Draft], compose.Composed | None]
# kind -> (share, composer, whether it can state a relation, whether it writes a word)
_COMPOSERS: dict[str, tuple[tuple[float, _Composer, bool, bool], ...]] = {
    "core": (
        (0.42, compose.one_thing, False, False),
        (0.28, compose.two_related, True, False),
        (0.30, compose.several_placed, False, False),
    ),
    "hard": (
        (0.28, compose.counted, False, False),
        (0.20, compose.in_a_row, True, False),
        (0.10, compose.related_to_two, True, False),
        (0.17, compose.several_placed, False, False),
        (0.25, compose.written, False, True),
    ),
    "terse": (
        (0.42, compose.keywords, False, False),
        (0.38, compose.bare_count, False, False),
        (0.10, compose.only_background, False, False),
        (0.10, compose.bare_word, False, True),
    ),
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
        kind: "core", "hard" or "terse".
        split: "train" or "held_out".
        height: frame height in pixels, a multiple of 16.
        width: frame width in pixels, a multiple of 16.

    Raises:
        KeyError: unknown kind.
        ValueError: nothing of this kind fits the frame.
    """
    composers = _COMPOSERS[kind]
    held_out = split == "held_out"
    for _ in range(_MAXIMUM_TRIES):
        point = rng.random()
        for share, composer, relates, writes in composers:  # noqa: B007
            point -= share
            if point < 0:
                break
        forced = NOTHING_FORCED
        if held_out:
            if composer is compose.only_background:
                continue
            forced = force_held_out(rng, triples=relates)
            if writes:
                forced = Forced(word=rng.choice(HELD_OUT_WORDS))
        composed = composer(compose.Draft(rng, kind, forced, held_out, height, width))
        if composed is None:
            continue
        scene, claims = composed
        if states_held_out(claims) if held_out else not contains_held_out(scene):
            return Example(scene, write(claims, rng), claims)
    raise ValueError(f"no {kind} scene fits a frame of {height}x{width}")
