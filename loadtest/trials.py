"""Held-out prompts, the verdicts on pictures of them, and their summary in shares."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deployments.builtin.claims import WORD
from deployments.builtin.world import Claims, Example, Verdict, check, sample_example
from loadtest.shares import wilson_interval

PromptKind = Literal["core", "hard"]
KINDS: tuple[PromptKind, ...] = ("core", "hard")
_CORE_SHARE = 0.6
_PICTURES_A_BATCH = 8
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


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


class Judges:
    """Checks pictures in processes of their own while more are being made; a context.

    Each process computes with one thread: with all cores in each, they mostly wait for one another.
    They start when the context is entered, so that they are ready when the first picture is.

    Args:
        workers: Processes; one a core, eight at most, if absent.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or min(8, os.cpu_count() or 1)
        self._pool = ProcessPoolExecutor(self._workers, mp_context=get_context("spawn"))
        self._waiting: list[tuple[NDArray[np.uint8], Claims]] = []
        self._batches: list[Future[list[Verdict]]] = []

    def __enter__(self) -> Judges:
        with _one_thread_each():
            for _ in range(self._workers):  # each of these starts a process
                self._pool.submit(_check_all, [])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, picture: NDArray[np.uint8], claims: Claims) -> None:
        """Hand over one picture, uint8 [height, width, 3]."""
        self._waiting.append((picture, claims))
        if len(self._waiting) >= _PICTURES_A_BATCH:
            self._send()

    def verdicts(self) -> list[Verdict]:
        """Return the verdicts on all pictures since the last call, in their order."""
        self._send()
        batches, self._batches = self._batches, []
        return [verdict for batch in batches for verdict in batch.result()]

    def _send(self) -> None:
        if self._waiting:
            self._batches.append(self._pool.submit(_check_all, self._waiting))
            self._waiting = []


def judge(pictures: Sequence[NDArray[np.uint8]], claims: Sequence[Claims]) -> list[Verdict]:
    """Check pictures, uint8 [height, width, 3], on all cores."""
    with Judges() as judges:
        for picture, stated in zip(pictures, claims, strict=True):
            judges.submit(picture, stated)
        return judges.verdicts()


def _check_all(pictures: Sequence[tuple[NDArray[np.uint8], Claims]]) -> list[Verdict]:
    return [check(picture, claims) for picture, claims in pictures]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Libraries of processes started meanwhile use one thread; those of this process keep theirs.

    They read these when they are loaded, which is before any code of ours runs there.
    """
    before = {name: os.environ.get(name) for name in _THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(_THREAD_SETTINGS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
