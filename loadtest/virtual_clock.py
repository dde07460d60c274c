"""The schedule under a virtual clock: what serving takes, without a card and without waiting.

Time passes only in forwards, each of which takes what the cost curve says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deployments.schedule import Work, choose
from deployments.step_costs import StepCosts
from loadtest.arrivals import Arrival
from loadtest.latencies import Served

Policy = Callable[[Sequence[Work], StepCosts, float], tuple[int, ...]]


def serve_steps(
    arrivals: Sequence[Arrival],
    costs: StepCosts,
    policy: Policy = choose,
    between_forwards_s: float = 0.0,
) -> Served:
    """Let the policy choose before every forward, among all that have arrived by then.

    Args:
        arrivals: In the order in which they come.
        costs: Seconds of a forward.
        policy: Chooses.
        between_forwards_s: What the engine itself takes between two forwards.
    """
    coming = list(reversed(arrivals))
    by_key = {arrival.key: arrival for arrival in arrivals}
    works: dict[int, Work] = {}
    finished_at: dict[int, float] = {}
    now = 0.0
    forwards = row_steps = 0
    while coming or works:
        if not works:
            now = max(now, coming[-1].at)
        while coming and coming[-1].at <= now:
            new = coming.pop()
            works[new.key] = _work(new, 0)
        chosen = policy(list(works.values()), costs, now)
        rows = sum(works[key].rows for key in chosen)
        now += costs.seconds(works[chosen[0]].shape, rows) + between_forwards_s
        forwards += 1
        row_steps += rows
        for key in chosen:
            done = works[key].steps_done + 1
            if done == by_key[key].steps:
                del works[key]
                finished_at[key] = now
            else:
                works[key] = _work(by_key[key], done)
    return Served(arrivals, finished_at, forwards, row_steps)


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
