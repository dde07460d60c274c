"""What kinds of cards do and cost, where nobody has measured yet: estimates, marked as such.

Speeds are relative to an H100 SXM on the denoising of SD3.5, and matter only until replicas have
told measured step times. Costs are typical on-demand list prices of one card with its share of the
machine, in US dollars an hour, of December 2025, and matter only relative to one another: set your
own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CardKind:
    """One kind of card.

    Attributes:
        speed: Of a cool card, an H100 being 1. An estimate unless the source says measured.
        cost_per_hour: US dollars, on demand. An estimate.
        source: What the speed was estimated from.
        memory_gib: What a process may allocate on an empty card: the total that nvidia-smi shows,
            less half a GiB; None where the name alone does not tell.
    """

    speed: float
    cost_per_hour: float
    source: str
    memory_gib: float | None = None


# Dense tensor TFLOP/s from the data sheets. FP8 where the chip has it, since Kelvin computes in FP8
# there: H100 1979, L40S 733, RTX 6000 Ada 728, L4 242; BF16 elsewhere: A100 312, A10G 70. The ratio
# of peaks understates small cards, since an H100 reaches only 40 % of its peak on this model
# (62 TFLOP in 80 ms): published FLUX times give an L20, whose ratio of peaks is 0.12, a speed of
# 0.22 (28 steps: 13.4 s against 2.97 s). An L4 has an L20's peak and a quarter of its power (72 W).
KINDS: dict[str, CardKind] = {
    "H100": CardKind(1.0, 6.9, "measured: the reference", 79.1),
    "H200": CardKind(1.05, 7.9, "an H100's arithmetic with faster memory; estimate", 139.9),
    "A100": CardKind(0.32, 3.0, "BF16 peak 312, no FP8; estimate"),
    "A100-40G": CardKind(0.32, 2.75, "BF16 peak 312, no FP8; estimate", 39.5),
    "A100-80G": CardKind(0.32, 3.4, "BF16 peak 312, no FP8; estimate", 79.5),
    "L40S": CardKind(0.45, 1.9, "FP8 peak 733, 350 W; estimate", 44.5),
    "RTX6000Ada": CardKind(0.42, 1.1, "FP8 peak 728, 300 W; estimate", 47.5),
    "L20": CardKind(0.22, 1.2, "published FLUX times; estimate", 44.5),
    "L4": CardKind(0.12, 0.8, "FP8 peak 242 at 72 W; estimate", 22.0),
    "A10G": CardKind(0.08, 1.0, "BF16 peak 70, no FP8; estimate", 22.0),
    "T4": CardKind(0.03, 0.53, "FP16 peak 65 at 70 W, no BF16; estimate", 14.5),
    "CPU": CardKind(0.001, 0.05, "of the order of 1 TFLOP/s a core group; estimate"),
}

H100_STEP_S = 0.084
"""Seconds of a guided step of SD3.5 Large at 1024x1024 on an H100, as measured
(`python -m loadtest.denoise_bench`, loadtest/data/h100/README.md)."""

UNKNOWN = CardKind(0.2, 2.0, "a kind this table does not know; a guess")


def card_kind(name: str) -> CardKind:
    """The estimates of a kind by Ray's name of it, in any case and spelling of separators."""
    wanted = _plain(name)
    for known, kind in KINDS.items():
        if wanted == _plain(known):
            return kind
    return UNKNOWN


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).removeprefix("nvidia")
