"""A replica's state as Ray Serve carries it to the autoscaler: bare numbers by name, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.pool_state import ReplicaState

NUMBERS = (
    *("waiting_s", "running_s", "requests", "accepted", "accepted_s", "slowdown", "duty"),
    *("margin_c", "throttled", "reasons", "power_w", "reading_age_s", "scripted", "rows", "step_s"),
)


def as_numbers(state: ReplicaState) -> dict[str, float]:
    """Return a state as Ray Serve carries it; what is not known is left out."""
    values = ((name, getattr(state, name)) for name in NUMBERS)
    return {name: float(value) for name, value in values if value is not None}


def from_numbers(replica: str, numbers: Mapping[str, float], age_s: float) -> ReplicaState:
    """Return the state that `as_numbers` gave; names that are not known are passed over.

    Args:
        replica: Its id.
        numbers: What it told.
        age_s: Since then.
    """
    known: dict[str, Any] = {name: numbers[name] for name in NUMBERS if name in numbers}
    for flag in ("throttled", "scripted"):
        known[flag] = bool(known.get(flag, 0.0) > 0)
    return ReplicaState(id=replica, age_s=age_s, **known)
