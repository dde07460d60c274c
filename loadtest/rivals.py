"""Serving without a step-level schedule: batches that run from their first step to their last.

Nothing is kept from them: the batch is collected the moment the card is free from what waits, the
oldest request's kind first, and requests without guidance cost them one row as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from deployments.step_costs import StepCosts, TokenShape
from loadtest.arrivals import Arrival
from loadtest.latencies import Served


def serve_batches(arrivals: Sequence[Arrival], costs: StepCosts, size: int) -> Served:
    """Run up to `size` requests of equal shape and steps together; 1 is plain FIFO.

    Args:
        arrivals: In the order in which they come.
        costs: Seconds of a forward.
        size: Most requests in a batch.

    Raises:
        ValueError: size is not positive.
    """
    if size < 1:
        raise ValueError(f"a batch of {size} requests cannot be")
    coming = deque(arrivals)
    queues: dict[tuple[TokenShape, int], deque[Arrival]] = {}
    finished_at: dict[int, float] = {}
    now = 0.0
    forwards = row_steps = 0
    while coming or queues:
        if not queues:
            now = max(now, coming[0].at)
        while coming and coming[0].at <= now:
            new = coming.popleft()
            queues.setdefault((new.shape, new.steps), deque()).append(new)
        kind = min(queues, key=lambda kind: (queues[kind][0].at, queues[kind][0].key))
        queue = queues[kind]
        batch = [queue.popleft() for _ in range(min(size, len(queue)))]
        if not queue:
            del queues[kind]
        shape, steps = kind
        rows = sum(arrival.rows for arrival in batch)
        now += steps * costs.seconds(shape, rows)
        forwards += steps
        row_steps += steps * rows
        finished_at.update((arrival.key, now) for arrival in batch)
    return Served(arrivals, finished_at, forwards, row_steps)
