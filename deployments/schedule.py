"""Which rows go into the next forward: a pure function of the live set, the costs and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments.step_costs import StepCosts, TokenShape

__all__ = ["MAX_ROWS", "TokenShape", "Work", "choose"]

MAX_ROWS = 32


@dataclass(frozen=True, slots=True)
class Work:
    """One request between two of its steps, as the policy sees it."""

    key: int
    shape: TokenShape
    rows: int  # of its next step: 1 without guidance, 2 with
    rows_left: int  # of all its remaining steps together, the next included
    steps_left: int
    submitted_at: float  # seconds, by the clock of `now`
    deadline: float | None = None  # by the same clock
    priority: int = 0  # higher first
    steps_done: int = 0  # 0: never stepped


def choose(
    works: Sequence[Work],
    costs: StepCosts,
    now: float,
    row_limit: Callable[[TokenShape], int] | None = None,
) -> tuple[int, ...]:
    """Return the keys of those whose rows share the next forward.

    Args:
        works: Everything that could be stepped, in any order; keys are unique.
        costs: Seconds of a forward.
        now: Seconds, by the clock of the works.
        row_limit: Most rows a forward of a shape may have (memory, captured graphs); `MAX_ROWS`
            where it is not given. One request alone is never held back by it.

    Returns:
        Keys of one TokenShape, the first being the request the forward is made for; empty only if
        `works` is. The same arguments, in any order of works, give the same answer.
    """
    if not works:
        return ()
    ordered = sorted(works, key=lambda work: (work.submitted_at, work.key))
    leader = ordered[0]
    limit = MAX_ROWS if row_limit is None else row_limit(leader.shape)
    chosen, rows = [leader.key], leader.rows
    for work in ordered[1:]:
        if work.shape == leader.shape and rows + work.rows <= limit:
            chosen.append(work.key)
            rows += work.rows
    return tuple(chosen)
