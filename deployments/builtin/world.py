"""The drawn world in one import: sample an example and draw it."""

from deployments.builtin.claims import Claims, RelationClaim, ThingClaim
from deployments.builtin.draw import draw
from deployments.builtin.sample import Kind, Split, sample_example
from deployments.builtin.scene import Example, Scene, Thing, Word
from deployments.builtin.vocabulary import words

__all__ = [
    "Claims",
    "Example",
    "Kind",
    "RelationClaim",
    "Scene",
    "Split",
    "Thing",
    "ThingClaim",
    "Word",
    "draw",
    "sample_example",
    "words",
]
