"""The heat of one replica's card: read in a thread of its own, held down, and told to people."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cluster.governor import Allowance, GovernorSettings
from cluster.heat_reading import Reading
from cluster.thermal import ScriptedHeat, open_source
from deployments.card_uuid import card_uuid
from deployments.governed_heat import GovernedHeat
from deployments.heat_rehearsal import Rehearsed
from deployments.heat_watch import HeatWatch

if TYPE_CHECKING:
    from deployments.warm_up import WarmableModel
    from serve.config import ThermalSettings
    from serve.heat_settings import GovernorSection

# NVML's clocks-event reasons, in words; which of them count as throttling says
# `cluster.heat_reading.THROTTLING`.
_REASONS = {
    0x01: "idle",
    0x02: "clocks set by an application",
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "clocks set for the display",
}


class CardHeat:
    """Watches one card; where nothing can be read, everything says so and nothing is held back.

    Args:
        device: That the replica computes on.
        thermal: Where readings come from.
        governor: How warm the card may get.
        pool: Of the replica; a script tells pools apart.

    Raises:
        ConfigurationError: The script of a rehearsal cannot be read or is wrong.
    """

    def __init__(
        self,
        device: torch.device,
        thermal: ThermalSettings,
        governor: GovernorSection,
        pool: str = "",
    ) -> None:
        source = open_source(card_uuid(device), thermal, pool=pool)
        self._source = source
        self._watch = None if source is None else HeatWatch(source, thermal.period_s)
        self.governor: Callable[[], Allowance] | None = None
        if self._watch is not None:
            settings = GovernorSettings(
                enabled=governor.enabled,
                below_limit_c=governor.below_limit_c,
                target_c=governor.target_c,
            )
            self.governor = GovernedHeat(self._watch, settings)

    @property
    def reading(self) -> Reading | None:
        """The newest; None: there is none."""
        return None if self._watch is None else self._watch.newest

    @property
    def age_s(self) -> float | None:
        """Seconds since the newest reading was taken."""
        return None if self._watch is None else self._watch.age_s

    def rehearsed(self, model: WarmableModel) -> WarmableModel:
        """Return the model, slowed down as a script says; itself where no script is read."""
        return Rehearsed(model, self._slowdown) if self._is_rehearsal else model

    def shown(self, allowance: Allowance) -> dict[str, Any] | None:
        """Return what `/v1/status` shows; None: nothing is read here.

        Args:
            allowance: What the governor last let the card do.
        """
        if self._source is None or self._watch is None:
            return None
        reading, age, problem = self.reading, self.age_s, self._watch.problem
        shown: dict[str, Any] = {
            "source": self._source.description,
            "scripted": self._is_rehearsal,
            "age_s": None if age is None else round(age, 3),
            "governor": {
                "duty": round(allowance.duty, 3),
                "most_rows": allowance.most_rows,
                "reason": allowance.reason,
            },
        }
        problems = [] if problem is None else [problem]
        if reading is None:
            return shown | {"problems": problems}
        return shown | {
            "temperature_c": reading.temperature_c,
            "memory_temperature_c": reading.memory_temperature_c,
            "margin_c": reading.margin_c,
            "limit_c": reading.limit_c,
            "throttled": reading.is_throttling,
            "clocks_event_reasons": reasons_in_words(reading.clocks_event_reasons),
            "power_w": reading.power_w,
            "power_cap_w": reading.power_cap_w,
            "sm_clock_mhz": reading.sm_clock_mhz,
            "problems": [*problems, *reading.problems],
        }

    def close(self) -> None:
        """Stop reading."""
        if self._watch is not None:
            self._watch.close()

    @property
    def _is_rehearsal(self) -> bool:
        return isinstance(self._source, ScriptedHeat)

    def _slowdown(self) -> float:
        reading = self.reading
        return 1.0 if reading is None else reading.slowdown


def reasons_in_words(reasons: int | None) -> list[str] | None:
    """Return why the clocks are where they are; None: the card does not say."""
    if reasons is None:
        return None
    return [words for bit, words in _REASONS.items() if reasons & bit]
