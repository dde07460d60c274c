"""How much worse are held-out combinations than those that training has seen?

Prompts of the same kinds, drawn as training draws them, beside the held-out ones. Drawing throws
away what does not belong to its split, which shifts the mix a little towards fewer things, so the
difference is told as it is and with seen prompts weighted to the held-out ones' mix.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from deployments.builtin.world import Example, sample_example
from loadtest.shares import wilson_interval
from loadtest.trials import KINDS, PromptKind, Trial, holds

_CORE_SHARE = 0.6  # as among held-out prompts


def seen_prompts(n: int, seed: int, height: int, width: int) -> list[tuple[PromptKind, Example]]:
    """Return n prompts with their kinds, without any held-out combination.

    Args:
        n: three fifths of them core, which come first.
        seed: of the drawing.
        height: of the frames that the scenes must fit, pixels.
        width: of the same.
    """
    rng = random.Random(f"adherence, seen:{seed}")
    core = round(n * _CORE_SHARE)
    kinds = (KINDS[0] if index < core else KINDS[1] for index in range(n))
    return [(kind, sample_example(rng, kind, "train", height, width)) for kind in kinds]


def against_seen(held_out: Sequence[Trial], seen: Sequence[Trial]) -> dict[str, Any]:
    """Compare shares of prompts all right, kind by kind.

    Returns:
        For each kind that both have: both shares and their numbers; `loss`, by how much held-out
        prompts are worse, with its 95 % `interval_95`; `loss_of_same_mix`, likewise with seen
        prompts weighted to the held-out ones' mix of contents; and the shares `by_content`.
    """
    report: dict[str, Any] = {}
    for kind in KINDS:
        ours, theirs = ([t for t in trials if t.kind == kind] for trials in (held_out, seen))
        if not ours or not theirs:
            continue
        right, other_right = (sum(t.verdict.all_right for t in each) for each in (ours, theirs))
        groups = {
            name: {
                "held_out": _share([t for t in ours if holds(t.example.claims) == name]),
                "seen": _share([t for t in theirs if holds(t.example.claims) == name]),
            }
            for name in sorted({holds(t.example.claims) for t in ours})
        }
        # Of a content that is not among the seen prompts nothing is known.
        known = [g for g in groups.values() if g["seen"]["n"]]
        weight = sum(g["held_out"]["n"] for g in known)
        same_mix = sum(
            g["held_out"]["n"] * (g["seen"]["right"] - g["held_out"]["right"]) for g in known
        )
        report[kind] = {
            "held_out": {"n": len(ours), "right": right / len(ours)},
            "seen": {"n": len(theirs), "right": other_right / len(theirs)},
            **difference(right, len(ours), other_right, len(theirs)),
            "loss_of_same_mix": same_mix / weight if weight else None,
            "by_content": groups,
        }
    return report


def difference(right: int, n: int, other_right: int, other_n: int) -> dict[str, Any]:
    """By how much the first share is below the second, with its 95 % interval.

    The interval is Newcombe's (1998) tenth method, from the Wilson intervals of both shares.
    """
    share, other = right / n, other_right / other_n
    low, high = wilson_interval(right, n)
    other_low, other_high = wilson_interval(other_right, other_n)
    loss = other - share
    below = math.hypot(other - other_low, high - share)
    above = math.hypot(other_high - other, share - low)
    return {"loss": loss, "interval_95": [loss - below, loss + above]}


def _share(trials: Sequence[Trial]) -> dict[str, float]:
    right = sum(trial.verdict.all_right for trial in trials)
    return {"n": len(trials), "right": right / len(trials) if trials else math.nan}
