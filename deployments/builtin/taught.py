"""Examples with a shape that the model does not know: what a LoRA learns from and is judged by."""

import random
from dataclasses import replace

from deployments.builtin.caption import write
from deployments.builtin.held_out import HELD_OUT_TAUGHT_COLORS
from deployments.builtin.sample import Kind, Split, sample_example
from deployments.builtin.scene import Example
from deployments.builtin.vocabulary import SHAPES

_MAXIMUM_TRIES = 1000


def taught_example(
    rng: random.Random,
    taught: str,
    kind: Kind,
    split: Split = "train",
    height: int = 256,
    width: int = 256,
) -> Example:
    """An ordinary example in which one of the stated shapes became the taught one.

    A ``train`` example has no taught shape in a colour of ``HELD_OUT_TAUGHT_COLORS``; a
    ``held_out`` example states at least one. What else is in it is of the ordinary ``train`` split.

    Args:
        rng: source of all randomness.
        taught: a name of ``TAUGHT_SHAPES``.
        kind: of ``sample_example``; one that states shapes.
        split: "train" or "held_out".
        height: frame height in pixels, a multiple of 16.
        width: frame width in pixels, a multiple of 16.

    Raises:
        ValueError: nothing of this kind fits the frame, or it states no shapes.
    """
    for _ in range(_MAXIMUM_TRIES):
        example = sample_example(rng, kind, "train", height, width)
        scene, claims = example.scene, example.claims
        stated = [claim.shape for claim in claims.things if claim.shape in SHAPES]
        if not stated:
            continue
        given = rng.choice(stated)
        if split == "train":
            colors = [thing.color for thing in scene.things if thing.shape == given]
            fits = not any(color in HELD_OUT_TAUGHT_COLORS for color in colors)
        else:
            fits = any(
                claim.shape == given and claim.color in HELD_OUT_TAUGHT_COLORS
                for claim in claims.things
            )
        if not fits:
            continue
        things = tuple(
            replace(thing, shape=taught) if thing.shape == given else thing
            for thing in scene.things
        )
        claims = replace(
            claims,
            things=tuple(
                replace(claim, shape=taught) if claim.shape == given else claim
                for claim in claims.things
            ),
        )
        return Example(replace(scene, things=things), write(claims, rng), claims)
    raise ValueError(f"no {kind} scene with a {taught} fits a frame of {height}x{width}")
