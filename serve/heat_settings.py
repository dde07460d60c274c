"""Settings of what follows load and heat: how many replicas, which of them, and how hot they get.

Each section turns into the settings of one pure policy in `cluster/`, which says what they do.
"""

# No `from __future__ import annotations` here: Ray Serve's builder needs real annotations.
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.plan_settings import PlanSettings

_PLAN = PlanSettings()


class Section(BaseModel):
    """One section of the settings: frozen, finite, and without names that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AutoscalingSettings(Section):
    """How many replicas; of pools that have `min_replicas` and `max_replicas`."""

    policy: Literal["kelvin", "queue"] = Field(
        "kelvin",
        description="`kelvin` plans all pools together, by seconds of work and by heat; `queue` is "
        "Ray Serve's own, by requests, with its defaults",
    )
    heat: bool = Field(
        True, description="count a replica near its card's limit, or slowed down, for less"
    )
    target_wait_s: float = Field(
        _PLAN.target_wait_s,
        gt=0,
        description="seconds of work that may wait before replicas are added",
    )
    target_utilisation: float = Field(
        _PLAN.target_utilisation,
        gt=0,
        le=1,
        description="share of their capacity that replicas should use",
    )
    scale_in_after_s: float = Field(
        _PLAN.scale_in_after_s,
        ge=0,
        description="seconds that fewer replicas must have sufficed before one goes",
    )
    stale_after_s: float = Field(
        _PLAN.stale_after_s, gt=0, description="seconds after which a reading counts no more"
    )
    after_surprise_s: float = Field(
        _PLAN.after_surprise_s,
        ge=0,
        description="seconds for which replicas stay for the most that came, after work waited far "
        "too long",
    )
    fast_s: float = Field(
        _PLAN.fast_s,
        gt=0,
        description="seconds of the quick average of arriving work, which sees a burst",
    )
    slow_s: float = Field(
        _PLAN.slow_s, gt=0, description="seconds of the slow average, which sees through noise"
    )


class RoutingSection(Section):
    """Which replica takes a request."""

    policy: Literal["kelvin", "power_of_two"] = Field(
        "kelvin",
        description="`kelvin`: where it ends first, by seconds of work, speed now and heat; "
        "`power_of_two` is Ray Serve's own: the shorter queue of two",
    )


class GovernorSection(Section):
    """How warm a replica lets its card get before it pauses between steps."""

    enabled: bool = Field(True, description="false leaves the card to its own protection")
    below_limit_c: float = Field(
        5.0, ge=0, le=100, description="degrees Celsius to stay under the card's own limit"
    )
    target_c: float | None = Field(
        None, ge=0, le=150, description="degrees Celsius to stay under, instead of that"
    )
