"""The governor of one replica's card, asked by the engine before every forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.governor import FREE, Allowance, Governor, GovernorSettings

if TYPE_CHECKING:
    from cluster.thermal import Reading

# A card that has not been read for so long says nothing about now.
_STALE_S = 10.0


class Watch(Protocol):
    """Knows the newest reading; `deployments.heat_watch.HeatWatch` is one."""

    @property
    def newest(self) -> Reading | None:
        """The newest reading; None: there was none yet."""

    @property
    def age_s(self) -> float | None:
        """Seconds since it was taken."""


class GovernedHeat:
    """Lets the governor see each new reading once; for the engine's thread.

    Args:
        watch: Of the card.
        settings: How warm the card may get.
    """

    def __init__(self, watch: Watch, settings: GovernorSettings) -> None:
        self._watch = watch
        self._governor = Governor(settings)
        self._seen_at: float | None = None

    def __call__(self) -> Allowance:
        """Return what the card may do now."""
        reading, age = self._watch.newest, self._watch.age_s
        if reading is None or age is None or age > _STALE_S:
            return FREE
        if reading.at != self._seen_at:
            self._seen_at = reading.at
            self._governor.observe(
                reading.at, reading.temperature_c, reading.limit_c, reading.is_throttling
            )
        return self._governor.allowance
