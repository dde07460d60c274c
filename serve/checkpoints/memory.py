"""What a model takes on disk and in memory, and which cards that fits, from headers alone.

Working memory is what was measured on an H100 at 1024x1024 (README): denoising 0.7 GiB beside the
weights with a replayed graph, decoding 2.6 eager; each process has CUDA's own context besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from cluster.card_kinds import KINDS
from serve.checkpoints.key_names import Kind
from serve.checkpoints.part import Part

GIB = 1 << 30
Weights = Literal["fp8", "bf16"]
Precision = Literal["auto", "fp8", "bf16", "fp32"]
Stage = Literal["text", "denoise", "decode"]

STAGES: Mapping[Stage, tuple[Kind, ...]] = {
    "text": ("clip_l", "clip_g", "t5"),
    "denoise": ("transformer",),
    "decode": ("vae",),
}
_WORKING: Mapping[Stage, float] = {"text": 0.5 * GIB, "denoise": 1.0 * GIB, "decode": 2.6 * GIB}
_CONTEXT = 0.6 * GIB
_MEASURED_PIXELS = 1024 * 1024

# Until a forward was measured: SD3.5 Large holds about this much for one token of one row (width
# 2432: its streams, normalised and quantised copies, q, k, v and four widths within the MLP).
GUESSED_BYTES_PER_TOKEN = 128 << 10
# Measured peaks repeat, but the allocator's blocks leave gaps between them.
FORWARD_HEADROOM = 1.15
_WIDTH_OF_GUESS = 2432
_PIXELS_PER_TOKEN = 16 * 16
_CLIP_TOKENS = 77

_BLOCKS = {"transformer": "transformer_blocks.", "t5": "encoder.block."}


@dataclass(frozen=True)
class CardKind:
    """A kind of card: what a process may allocate on an empty one, and what it multiplies in."""

    name: str
    usable_bytes: float
    fp8_units: bool


def _card(name: str, kind: str, fp8_units: bool) -> CardKind:
    return CardKind(name, (KINDS[kind].memory_gib or 0.0) * GIB, fp8_units)


CARDS = (
    _card("L4 24 GB", "L4", True),
    _card("A10G 24 GB", "A10G", False),
    _card("H100 80 GB", "H100", True),
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


@dataclass(frozen=True)
class StageNeeds:
    """What one replica of a stage takes of its card, in bytes.

    Attributes:
        weights: In the precision that `held` names.
        working: Of the largest forward or decoding.
        held: How the weights are held.
    """

    weights: int
    working: int
    held: str

    @property
    def total(self) -> int:
        """Return all of it, with CUDA's own context."""
        return self.weights + self.working + int(_CONTEXT)

    def at_most(self, limit: int) -> StageNeeds:
        """Return the needs where weights and work keep to a limit, as decoding in tiles does."""
        return replace(self, working=max(0, min(self.working, limit - self.weights)))

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.1f} GiB ({self.held} weights {self.weights / GIB:.1f}, work"
            f" {self.working / GIB:.1f}, CUDA's context {_CONTEXT / GIB:.1f})"
        )


def stage_needs(
    stage: Stage,
    parts: Mapping[Kind, Part],
    precision: Precision,
    *,
    pixels: int,
    text_tokens: int,
    rows: int,
) -> StageNeeds:
    """Return what one replica takes; of what `auto` may choose, the least.

    Args:
        stage: Of the replica.
        parts: Of the model.
        precision: Of the pool.
        pixels: Of the largest picture.
        text_tokens: T5's tokens of a prompt.
        rows: Of the largest forward.
    """
    held: Weights = "fp8" if precision in ("auto", "fp8") and stage != "decode" else "bf16"
    own = [(kind, parts[kind]) for kind in STAGES[stage] if kind in parts]
    weights = sum(resident_bytes(kind, part, held) for kind, part in own)
    if precision == "fp32":
        weights *= 2
    working = _WORKING[stage]
    if stage == "denoise":
        tokens = pixels // _PIXELS_PER_TOKEN + _CLIP_TOKENS + text_tokens
        width = parts["transformer"].weights["pos_embed.proj.weight"].shape[0]
        per_token = GUESSED_BYTES_PER_TOKEN * FORWARD_HEADROOM * width / _WIDTH_OF_GUESS
        working = rows * tokens * per_token
    elif stage == "decode":
        working *= pixels / _MEASURED_PIXELS
    return StageNeeds(weights, int(working), "fp32" if precision == "fp32" else held)
