"""What a model takes on disk and in memory, and which cards that fits, from headers alone.

Working memory is what was measured on an H100 at 1024x1024 (README): denoising 0.7 GiB beside the
weights with a replayed graph, decoding 2.6 eager; each process has CUDA's own context besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from serve.checkpoints.key_names import Kind
from serve.checkpoints.part import Part

GIB = 1 << 30
Weights = Literal["fp8", "bf16"]
Stage = Literal["text", "denoise", "decode"]

STAGES: Mapping[Stage, tuple[Kind, ...]] = {
    "text": ("clip_l", "clip_g", "t5"),
    "denoise": ("transformer",),
    "decode": ("vae",),
}
_WORKING: Mapping[Stage, float] = {"text": 0.5 * GIB, "denoise": 1.0 * GIB, "decode": 2.6 * GIB}
_CONTEXT = 0.6 * GIB
_BLOCKS = {"transformer": "transformer_blocks.", "t5": "encoder.block."}


@dataclass(frozen=True)
class CardKind:
    """A kind of card: what a process may allocate on an empty one, and what it multiplies in."""

    name: str
    usable_bytes: float
    fp8_units: bool


CARDS = (
    CardKind("L4 24 GB", 22.0 * GIB, True),
    CardKind("A10G 24 GB", 22.0 * GIB, False),
    CardKind("H100 80 GB", 79.1 * GIB, True),
)


def resident_bytes(kind: Kind, part: Part, weights: Weights) -> int:
    """Return what a part's weights take in memory.

    Args:
        kind: Which part.
        part: Of it.
        weights: How the matrices of the blocks are held; all else is bfloat16.
    """
    prefix = _BLOCKS.get(kind)
    total = 0
    for name, source in part.weights.items():
        if kind == "vae" and name.startswith(("encoder.", "quant_conv.")):
            continue  # decoding needs one half only
        count = prod(source.shape)
        stored_fp8 = source.dtype.startswith("F8_E")
        matrix = len(source.shape) == 2 and not name.endswith(("relative_attention_bias.weight",))
        in_blocks = prefix is not None and name.startswith(prefix)
        if weights == "fp8" and matrix and (in_blocks or (stored_fp8 and kind != "vae")):
            total += count + 4 * source.shape[0]
        else:
            total += 2 * count
    return total


@dataclass(frozen=True)
class Fit:
    """How one kind of card would hold a model.

    Attributes:
        card: Which.
        precision: In words, of each stage.
        needs: Bytes of each stage alone on a card, working memory included.
        together: Bytes of all stages on one card.
    """

    card: CardKind
    precision: Mapping[Stage, str]
    needs: Mapping[Stage, int]
    together: int

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages that fit the card, each alone."""
        return tuple(s for s, needed in self.needs.items() if needed <= self.card.usable_bytes)

    @property
    def all_fit(self) -> bool:
        """Return whether one card holds all of it."""
        return self.together <= self.card.usable_bytes


def fits(parts: Mapping[Kind, Part]) -> list[Fit]:
    """Say for each kind of card what fits and in which precision."""
    return [_fit(card, parts) for card in CARDS]


def _fit(card: CardKind, parts: Mapping[Kind, Part]) -> Fit:
    precision: dict[Stage, str] = {}
    weights_of: dict[Stage, int] = {}
    for stage, kinds in STAGES.items():
        own = [(kind, parts[kind]) for kind in kinds if kind in parts]
        in_bf16 = sum(resident_bytes(kind, part, "bf16") for kind, part in own)
        in_fp8 = sum(resident_bytes(kind, part, "fp8") for kind, part in own)
        room = card.usable_bytes - _WORKING[stage] - _CONTEXT
        if stage == "decode":
            precision[stage], weights_of[stage] = "bf16", in_bf16
        elif card.fp8_units:
            precision[stage], weights_of[stage] = "fp8 weights, fp8 arithmetic", in_fp8
        elif in_bf16 <= room:
            # What `auto` weighs by measuring; here only that it may.
            precision[stage], weights_of[stage] = "bf16 (or fp8 weights)", in_bf16
        else:
            precision[stage], weights_of[stage] = "fp8 weights, bf16 arithmetic", in_fp8
    needs = {s: int(size + _WORKING[s] + _CONTEXT) for s, size in weights_of.items()}
    smallest = sum(
        resident_bytes(kind, part, "bf16" if kind == "vae" else "fp8")
        for kind, part in parts.items()
    )
    together = int(smallest + max(_WORKING.values()) + _CONTEXT * len(STAGES))
    return Fit(card, precision, needs, together)
