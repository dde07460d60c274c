"""Which tenant's work goes next: start-time fair queueing over estimated seconds of work.

Goyal, Vin and Cheng 1996, "Start-time Fair Queueing": each flow's work begins, in a virtual time,
when the flow's work before it ends, and what begins first goes first. Virtual time is the start of
what went last, so a flow that was idle has saved nothing up. While two flows both have work
waiting, what they got over their weights never differs by more than the largest piece of each.

Within a flow higher priority goes first, then who came first.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class _Flow(Generic[Item]):
    start: float = 0.0  # of its next piece, in virtual time
    finish: float = 0.0  # of its last one
    # (-priority, number, cost over weight, item); numbers differ, so items are never compared.
    waiting: list[tuple[int, int, float, Item]] = field(default_factory=list)


class FairQueue(Generic[Item]):
    """What waits, by flow. It has no clock."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[Item]] = {}
        self._virtual = 0.0
        self._number = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(
        self, flow: str, item: Item, cost: float, weight: float = 1.0, priority: int = 0
    ) -> None:
        """Let an item wait.

        Args:
            flow: Whose it is.
            item: What `pop` returns.
            cost: Of it, above 0, in a unit common to all flows.
            weight: Of the flow, above 0.
            priority: Within the flow; higher goes first.
        """
        own = self._flows.setdefault(flow, _Flow())
        if not own.waiting:
            own.start = max(self._virtual, own.finish)
        self._number += 1
        self._length += 1
        heapq.heappush(own.waiting, (-priority, self._number, cost / weight, item))

    def pop(self) -> Item | None:
        """Take out what goes next; None if nothing waits."""
        waiting = [(flow.start, name) for name, flow in self._flows.items() if flow.waiting]
        if not waiting:
            return None
        start, name = min(waiting)
        flow = self._flows[name]
        _, _, cost, item = heapq.heappop(flow.waiting)
        self._length -= 1
        self._virtual = start
        flow.start = flow.finish = start + cost
        # Who is idle and owes nothing is as good as new.
        for other in [
            each
            for each, idle in self._flows.items()
            if not idle.waiting and idle.finish <= self._virtual
        ]:
            del self._flows[other]
        return item

    def discard(self, flow: str, item: Item) -> bool:
        """Take out an item that need not wait any more; False if it does not wait."""
        own = self._flows.get(flow)
        if own is None:
            return False
        for place, entry in enumerate(own.waiting):
            if entry[3] is item:
                own.waiting[place] = own.waiting[-1]
                own.waiting.pop()
                heapq.heapify(own.waiting)
                self._length -= 1
                return True
        return False
