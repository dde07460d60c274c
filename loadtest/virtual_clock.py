"""The schedule under a virtual clock: what serving takes, without a card and without waiting.

Time passes only in forwards, each of which takes what the cost curve says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments.schedule import Work, choose
from deployments.step_costs import StepCosts
from loadtest.arrivals import Arrival

Policy = Callable[[Sequence[Work], StepCosts, float], tuple[int, ...]]


@dataclass(frozen=True)
class Run:
    """What became of the arrivals, by their keys."""

    finished_at: dict[int, float]  # seconds
    forwards: int
    row_steps: int
    busy_s: float


def serve_steps(arrivals: Sequence[Arrival], costs: StepCosts, policy: Policy = choose) -> Run:
    """Let the policy choose before every forward, among all that have arrived by then."""
    coming = list(reversed(arrivals))
    by_key = {arrival.key: arrival for arrival in arrivals}
    works: dict[int, Work] = {}
    finished_at: dict[int, float] = {}
    now = busy = 0.0
    forwards = row_steps = 0
    while coming or works:
        if not works:
            now = max(now, coming[-1].at)
        while coming and coming[-1].at <= now:
            new = coming.pop()
            works[new.key] = _work(new, 0)
        chosen = policy(list(works.values()), costs, now)
        rows = sum(works[key].rows for key in chosen)
        seconds = costs.seconds(works[chosen[0]].shape, rows)
        now += seconds
        busy += seconds
        forwards += 1
        row_steps += rows
        for key in chosen:
            done = works[key].steps_done + 1
            if done == by_key[key].steps:
                del works[key]
                finished_at[key] = now
            else:
                works[key] = _work(by_key[key], done)
    return Run(finished_at, forwards, row_steps, busy)


def _work(arrival: Arrival, done: int) -> Work:
    left = arrival.steps - done
    return Work(
        key=arrival.key,
        shape=arrival.shape,
        rows=arrival.rows,
        rows_left=left * arrival.rows,
        steps_left=left,
        submitted_at=arrival.at,
        steps_done=done,
    )
