"""The drawn world in one import: sample an example, draw it, read a prompt, check a picture."""

from deployments.builtin.checker import Verdict, check
from deployments.builtin.claims import Claims, RelationClaim, ThingClaim
from deployments.builtin.draw import draw
from deployments.builtin.read import PromptError, UnknownWordError, read_claims
from deployments.builtin.sample import Kind, Split, sample_example
from deployments.builtin.scene import Example, Scene, Thing, Word
from deployments.builtin.vocabulary import words

__all__ = [
    "Claims",
    "Example",
    "Kind",
    "PromptError",
    "RelationClaim",
    "Scene",
    "Split",
    "Thing",
    "ThingClaim",
    "UnknownWordError",
    "Verdict",
    "Word",
    "check",
    "draw",
    "read_claims",
    "sample_example",
    "words",
]
