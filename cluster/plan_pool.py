"""A pool as the plan reckons with it: numbers that can be true, arrays of one value a replica."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.derating import Flags, Floats


@dataclass(frozen=True, slots=True)
class Pool:
    """A `PoolState` that can be reckoned with; arrays have one value a replica.

    Attributes:
        present: The counts are of, and of what follows.
        waiting_s: Cool seconds that wait, or share the card with others: what is held beyond one
            request, begun or not.
        held_s: Cool seconds held.
        accepted_s: Cool seconds ever accepted.
        reported_age_s: Since the report; infinite if not known.
        measured: Speed as measured, 1 being cool: duty over slowdown.
        margin_c: NaN where nothing fresh is known.
        throttled: From fresh readings only.
        factor: How much of the replica counts: the smaller of what was measured and foretold.
        usual_factor: Their median, since one card with a failed fan says little about the next, all
            cards being hot says much; 1 without replicas.
        scripted: What it tells of its card is a rehearsal's.
        usual_step_s: Cool seconds of the usual step on its cards; None: nobody told.
        busy: Something is held or queued.
        told_request_s: Whether `request_s` was told and not assumed.
        late: Replicas that were asked for long enough ago to have started, and have not.
        late_s: Since the first of them was asked for.
        is_unreliable: What was asked for here did not start lately.
    """

    name: str
    stage: str
    model: str
    kind: str
    ids: tuple[str, ...]
    target: int
    minimum: int
    maximum: int
    queued: float
    request_s: float
    told_request_s: bool
    kind_speed: float
    is_estimate: bool
    cost_per_hour: float
    start_s: float
    waiting_s: Floats
    held_s: Floats
    accepted_s: Floats
    reported_age_s: Floats
    measured: Floats
    margin_c: Floats
    throttled: Flags
    factor: Floats
    usual_factor: float
    scripted: Flags
    usual_step_s: float | None
    busy: bool
    late: int = 0
    late_s: float = 0.0
    is_unreliable: bool = False

    @property
    def group(self) -> tuple[str, str]:
        """Stage and model: pools that may take each other's requests."""
        return self.stage, self.model

    @property
    def queued_s(self) -> float:
        """Cool seconds that wait outside of the replicas."""
        return self.queued * self.request_s

    @property
    def present(self) -> int:
        """Replicas that take requests."""
        return len(self.ids)
