"""What is known of every pool at one moment: what the plan, the routing and the simulator share.

Work is counted in cool seconds: what it takes on one replica of its pool while the card is cool and
does nothing else. A replica does `speed` cool seconds of work a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["text", "denoise", "decode"]


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What one replica last told of itself.

    Attributes:
        id: Unique among all replicas, never used again.
        waiting_s: Cool seconds of the requests it holds and has not begun.
        running_s: Cool seconds that are left of those it has begun.
        requests: It holds, begun or not.
        accepted: Requests it has ever accepted.
        accepted_s: Cool seconds of all the work it has ever accepted.
        slowdown: What a forward takes now over what the same took while the card was cool; 1 is
            cool. None: it has not made enough forwards lately to know.
        duty: Share of the time that its governor lets it compute, 0 to 1.
        margin_c: Degrees Celsius to the temperature at which the card slows down, below 0 beyond
            it. None: the card does not say.
        throttled: The card is being slowed down for heat now (`cluster.thermal.THROTTLING`).
        reasons: NVML's bits of why its clock is where it is. None: the card does not say.
        power_w: Watts of the whole card. None: the card does not say.
        reading_age_s: Since the card was last read. None: it never was.
        scripted: What it tells of its card is a rehearsal's, and not so.
        rows: Of its last forward; 0 while it has nothing to do.
        step_s: Cool seconds of one guided step of the model's usual size, as measured here: what
            cards of several kinds, and replicas of one pool, are compared by. None: not measured.
        holds: What it has at hand and what it works on, as keys for the routing
            (`cluster.work_keys`); the autoscaler is not told.
        age_s: Since the replica told all this.
    """

    id: str
    waiting_s: float = 0.0
    running_s: float = 0.0
    requests: float = 0.0
    accepted: float = 0.0
    accepted_s: float = 0.0
    slowdown: float | None = None
    duty: float = 1.0
    margin_c: float | None = None
    throttled: bool = False
    power_w: float | None = None
    reading_age_s: float | None = None
    age_s: float = 0.0
    reasons: int | None = None
    scripted: bool = False
    rows: int = 0
    step_s: float | None = None
    holds: frozenset[str] = frozenset()

    @property
    def backlog_s(self) -> float:
        """Cool seconds of all that it holds."""
        return self.waiting_s + self.running_s

    @property
    def speed(self) -> float:
        """Cool seconds of work it does a second, as far as was measured."""
        return self.duty / max(self.slowdown or 1.0, 1e-3)


@dataclass(frozen=True, slots=True)
class PoolState:
    """One pool: one stage of one model on one kind of card.

    Attributes:
        name: Of the pool; its Serve deployment is called so too.
        stage: Which of the three.
        model: Pools of one stage and one model may take each other's requests.
        kind: Of card, as Ray calls accelerator types: `H100`, `L4`, `A10G`; `CPU` without one.
        replicas: That take requests now, in any order.
        target: Replicas that are asked for at present; more than run while some start.
        minimum: Never fewer.
        maximum: Never more.
        queued: Requests that wait for any of its replicas, outside of them.
        request_s: Mean cool seconds of a request on this pool. None: nothing came yet.
        kind_speed: Of a cool card of this kind, 1 being an H100.
        is_estimate: That is from a table, and gives way to what replicas measure.
        cost_per_hour: Of one replica, in any unit that all pools share.
        start_s: From asking for a replica to its first request.
    """

    name: str
    stage: Stage
    model: str
    kind: str
    replicas: tuple[ReplicaState, ...]
    target: int
    minimum: int
    maximum: int
    queued: float = 0.0
    request_s: float | None = None
    kind_speed: float = 1.0
    is_estimate: bool = False
    cost_per_hour: float = 1.0
    start_s: float = 60.0

    @property
    def starting(self) -> int:
        """Replicas that were asked for and take no requests yet."""
        return max(self.target - len(self.replicas), 0)
