"""A pool of replicas and the handle in front of it, as Ray Serve runs them.

A replica takes `max_ongoing_requests` at most; what finds none free waits at the handle, first come
first served. Replicas start, are drained when there are too many, and vanish with their card.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.pool_state import Stage
from cluster.simulation.kinds import KindName
from cluster.simulation.traffic import Request


class Replica(Protocol):
    """What pools need of a replica of any stage."""

    id: str
    card: int
    ongoing: int
    accepted: int
    accepted_s: float
    speed: float
    version: int

    @property
    def holds(self) -> frozenset[str]:
        """What it has at hand and works on, as keys for the routing."""

    def own_s(self, request: Request) -> float:
        """Return the cool seconds that a request takes here alone."""

    def accept(self, request: Request, now: float) -> float | None:
        """Take a request; return when its next event is, if that changed."""

    def finish_stretch(self, now: float) -> tuple[list[Request], float | None]:
        """Return what is done, and when the next event is."""

    def backlog(self, now: float) -> tuple[float, float]:
        """Return cool seconds not begun, and left of what is begun."""


class Router(Protocol):
    """Chooses among the replicas of one pool."""

    def pick(self, pool: Pool, request: Request, now: float) -> Replica | None:
        """Return one that has a free place; None if there is none."""

    def joined(self, replica: Replica) -> None:
        """Hear of a replica that takes requests from now on."""

    def left(self, replica: Replica) -> None:
        """Hear of a replica that takes none any more."""


@dataclass(frozen=True)
class PoolSpec:
    """What does not change about a pool.

    Attributes:
        name: Unique.
        stage: Which.
        kind: Of card; of several kinds the first.
        minimum: Replicas.
        maximum: Replicas.
        start_s: From asking for a replica to its first request.
        max_ongoing_requests: Of a replica.
    """

    name: str
    stage: Stage
    kind: KindName
    minimum: int
    maximum: int
    start_s: float
    max_ongoing_requests: int


class Pool:
    """Replicas of one stage, and what waits for them.

    Args:
        spec: What it is.
        router: Chooses the replica.
        make: Returns a new replica on a card (-1: it needs none).
        cards: Those it may run on; None where it needs none.
        seed: Draws the card of a new replica, and which replica goes.
        send: Called with a replica, the time of its next event, and the time.
    """

    def __init__(
        self,
        spec: PoolSpec,
        router: Router,
        make: Callable[[str, int], Replica],
        cards: list[int] | None,
        seed: str,
        send: Callable[[Pool, Replica, float, float], None],
    ) -> None:
        self.spec = spec
        self.router = router
        self.replicas: list[Replica] = []
        self.draining: dict[str, Replica] = {}
        self.starting: dict[str, tuple[float, int]] = {}  # when it is ready, and its card
        self.waiting: deque[Request] = deque()
        self.waiting_since = 0.0  # something
        self.target = 0
        self.offered = 0
        self.offered_s = 0.0
        self._make = make
        self._free = None if cards is None else list(cards)
        self._withdrawn: set[int] = set()
        self._random = random.Random(f"{seed} {spec.name}")
        self._send = send
        self._made = 0
        self.took_card: Callable[[int, bool], None] = lambda card, taken: None

    def offer(self, request: Request, now: float) -> None:
        """Give a request to a replica, or let it wait."""
        if self.waiting or not self._place(request, now):
            self.waiting_since = self.waiting_since if self.waiting else now
            self.waiting.append(request)

    def offer_again(self, requests: list[Request], now: float) -> None:
        """Put requests that lost their replica before all that wait."""
        self.waiting.extendleft(reversed(requests))
        self.place_waiting(now)

    def place_waiting(self, now: float) -> None:
        """Give away what waits, as far as there are free places."""
        while self.waiting and self._place(self.waiting[0], now):
            self.waiting.popleft()

    def released(self, replica: Replica) -> None:
        """Let a drained replica go once it is empty."""
        if replica.ongoing == 0 and self.draining.pop(replica.id, None) is not None:
            self._give_back(replica.card)

    def start_now(self, number: int, now: float) -> None:
        """Begin with replicas that are ready."""
        self.target = number
        for _ in range(number):
            self._join(self._take_card(), now)

    def reconcile(self, now: float) -> None:
        """Let those in that are ready, then start or stop replicas towards the target."""
        for id, (ready, card) in list(self.starting.items()):
            if ready <= now:
                del self.starting[id]
                self._join(card, now, id)
        self.place_waiting(now)
        while len(self.replicas) + len(self.starting) < self.target:
            if self._free is not None and not self._free:
                break
            self._made += 1
            ready = now + self.spec.start_s
            self.starting[f"{self.spec.name}#{self._made}"] = (ready, self._take_card())
        while len(self.replicas) + len(self.starting) > self.target:
            if self.starting:
                _, (_, card) = self.starting.popitem()
                self._give_back(card)
            else:
                self.drain(self._random.choice(self.replicas))

    def drain(self, replica: Replica) -> None:
        """Give a replica no further requests; it goes when it is empty."""
        self.replicas.remove(replica)
        self.router.left(replica)
        self.draining[replica.id] = replica
        self.released(replica)

    def withdraw(self, card: int) -> None:
        """Take a card away: at once if it is free or a replica starts on it, or else after it."""
        self._withdrawn.add(card)
        for id, (_, used) in list(self.starting.items()):
            if used == card:
                del self.starting[id]
                self._give_back(card)
        if self._free is not None and card in self._free:
            self._free.remove(card)

    def put_back(self, card: int) -> None:
        """Make a card free that was withdrawn."""
        self._withdrawn.discard(card)
        if self._free is not None:
            self._free.append(card)

    @property
    def held(self) -> int:
        """Replicas that cost: running, starting or draining."""
        return len(self.replicas) + len(self.starting) + len(self.draining)

    def _place(self, request: Request, now: float) -> bool:
        replica = self.router.pick(self, request, now)
        if replica is None:
            return False
        self.offered += 1
        self.offered_s += replica.own_s(request)
        ends = replica.accept(request, now)
        if ends is not None:
            self._send(self, replica, ends, now)
        return True

    def _join(self, card: int, now: float, id: str | None = None) -> None:
        if id is None:
            self._made += 1
            id = f"{self.spec.name}#{self._made}"
        replica = self._make(id, card)
        self.replicas.append(replica)
        self.router.joined(replica)

    def _take_card(self) -> int:
        if self._free is None:
            return -1
        card = self._free.pop(self._random.randrange(len(self._free)))
        self.took_card(card, True)
        return card

    def _give_back(self, card: int) -> None:
        if self._free is not None:
            self.took_card(card, False)
            if card not in self._withdrawn:
                self._free.append(card)
