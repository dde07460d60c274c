"""Held-out prompts, the verdicts on pictures of them, and their summary in shares."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deployments.builtin.claims import WORD
from deployments.builtin.world import Claims, Example, Verdict, check, sample_example
from loadtest.shares import wilson_interval

PromptKind = Literal["core", "hard"]
KINDS: tuple[PromptKind, ...] = ("core", "hard")
_CORE_SHARE = 0.6


@dataclass(frozen=True)
class Trial:
    """One prompt and what the picture of it was found to show."""

    kind: PromptKind
    example: Example
    seed: int
    verdict: Verdict


def held_out_prompts(
    n: int, seed: int, height: int, width: int
) -> list[tuple[PromptKind, Example]]:
    """Return n prompts with their kinds that depend on nothing but the arguments.

    Each states a combination that training never saw.

    Args:
        n: three fifths of them core, which come first.
        seed: of the drawing.
        height: of the frames that the scenes must fit, pixels.
        width: of the same.
    """
    rng = random.Random(f"adherence:{seed}")
    core = round(n * _CORE_SHARE)
    kinds = (KINDS[0] if index < core else KINDS[1] for index in range(n))
    return [(kind, sample_example(rng, kind, "held_out", height, width)) for kind in kinds]


def judge(pictures: Sequence[NDArray[np.uint8]], claims: Sequence[Claims]) -> list[Verdict]:
    """Check pictures, uint8 [height, width, 3], on all cores."""
    workers = min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check, pictures, claims, chunksize=8))


def holds(claims: Claims) -> str:
    """Say how much a prompt asks for: `one thing` to `three or four things`, or `a word`."""
    if any(thing.shape == WORD for thing in claims.things):
        return "a word"
    number = sum(thing.count or 1 for thing in claims.things)
    return {1: "one thing", 2: "two things"}.get(number, "three or four things")


def summarise(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return shares of prompts all right for each kind that occurs.

    Of each kind also by what the prompt holds, and of each attribute over the prompts that state
    it; every share with its n.
    """
    report: dict[str, Any] = {}
    for kind in KINDS:
        own = [trial for trial in trials if trial.kind == kind]
        if not own:
            continue
        right = sum(trial.verdict.all_right for trial in own)
        report[kind] = {
            "n": len(own),
            "all_right": right / len(own),
            "interval_95": list(wilson_interval(right, len(own))),
            "by_content": _shares((holds(t.example.claims), t.verdict.all_right) for t in own),
            "attributes": _shares(pair for t in own for pair in t.verdict.attributes.items()),
        }
    return report


def _shares(outcomes: Iterable[tuple[str, bool]]) -> dict[str, dict[str, float]]:
    collected: dict[str, list[bool]] = {}
    for name, right in outcomes:
        collected.setdefault(name, []).append(right)
    return {
        name: {"n": len(rights), "right": sum(rights) / len(rights)}
        for name, rights in sorted(collected.items())
    }
