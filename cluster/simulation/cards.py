"""All cards of a cluster, a second at a time: power makes heat, and heat takes the clock.

A card protects itself in two ways, as NVIDIA's do. From its limit on a controller lowers the clock
and holds the card two degrees under the limit until full clock is back (reason 0x20). A little
further up it halves the clock at once (0x40) until that has cooled it. Speed goes with the clock,
power above idle with its square: published power-capping curves of such cards lie about there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.simulation.kinds import CardKind
from cluster.simulation.thermal_model import Array, ThermalState

_HOLDS_BELOW_C = 2.0
_CLOCK_A_DEGREE_SECOND = 0.01
_POWER_EXPONENT = 2.0
_BRAKE = 0.5
_EMPTY = 0.63  # of idle power, with no model loaded: 75 of an H100's 120 W
SOFTWARE_THERMAL, HARDWARE_THERMAL = 0x20, 0x40

Indices = NDArray[np.int64]


class Cards:
    """State of every card, one array element each.

    Args:
        kinds: Of each card.
        spread: Shape (cards,), factors on the resistance into the air.

    Attributes:
        occupied: A replica runs or starts on it.
        duty: Share of the time that a governor lets it compute.
        clock: Share of its usual clock.
        energy_j: So far.
        throttled_s: So far, while occupied.
        hottest_c: So far, while occupied.
    """

    def __init__(self, kinds: list[CardKind], spread: Array) -> None:
        number = len(kinds)
        self.kinds = kinds
        self.load_w = np.array([kind.load_w for kind in kinds])
        self.idle_w = np.array([kind.idle_w for kind in kinds])
        self.cost_per_hour = np.array([kind.cost_per_hour for kind in kinds])
        self.limit_c = np.array([kind.limit_c for kind in kinds])
        self._brake_c = self.limit_c + np.array([kind.brake_above_c for kind in kinds])
        self._least_clock = np.array([kind.least_clock for kind in kinds])
        self._spread = spread
        empty_w = self.idle_w * _EMPTY
        self.thermal = ThermalState([kind.thermal for kind in kinds], empty_w)
        self.thermal.hinder(np.arange(number), spread)
        self._cap = np.ones(number)
        self._heat_clock = np.ones(number)
        self._slowed = np.zeros(number, bool)
        self._braked = np.zeros(number, bool)
        self.occupied = np.zeros(number, bool)
        self.duty = np.ones(number)
        self.clock = np.ones(number)
        self.temperature_c = self.thermal.temperature_c
        self.energy_j = np.zeros(number)
        self.throttled_s = np.zeros(number)
        self.power_w = empty_w
        self.hottest_c = np.full(number, -np.inf)
        self._busy = np.zeros(number, bool)
        self._since = np.zeros(number)
        self._busy_s = np.zeros(number)
        self._now = 0.0

    def set_busy(self, card: int, busy: bool, now: float) -> None:
        """Say that a card begins or ends computing."""
        if self._busy[card]:
            self._busy_s[card] += now - self._since[card]
        self._busy[card] = busy
        self._since[card] = now

    def fail_cooling(self, cards: Indices, factor: float) -> None:
        """Multiply the resistance into the air."""
        self.thermal.hinder(cards, self._spread[cards] * factor)

    def cap_power(self, cards: Indices, of_load: float) -> None:
        """Let cards draw no more than a share of what they draw under load."""
        room = (of_load * self.load_w[cards] - self.idle_w[cards]) / (
            self.load_w[cards] - self.idle_w[cards]
        )
        clock = np.maximum(room, 0.0) ** (1 / _POWER_EXPONENT)
        self._cap[cards] = np.maximum(clock, self._least_clock[cards])

    def warm_air(self, by_c: float) -> None:
        """Make the air everywhere so much warmer."""
        self.thermal.ambient_c = self.thermal.ambient_c + by_c

    def count_from_now(self) -> None:
        """Forget energy, throttled time and the hottest temperature so far."""
        self.energy_j[:] = 0.0
        self.throttled_s[:] = 0.0
        self.hottest_c[:] = -np.inf

    @property
    def readings_c(self) -> Array:
        """Whole degrees, as NVML tells them."""
        return np.rint(self.temperature_c)

    @property
    def throttled(self) -> NDArray[np.bool_]:
        """Cards that slow themselves down for heat."""
        return self._slowed | self._braked

    def throttled_at(self, card: int) -> bool:
        """True if one card slows itself down for heat."""
        return bool(self._slowed[card] or self._braked[card])

    @property
    def reasons(self) -> Indices:
        """Clocks-event reasons, as NVML tells them."""
        slowed, braked = self._slowed.astype(np.int64), self._braked.astype(np.int64)
        return slowed * SOFTWARE_THERMAL + braked * HARDWARE_THERMAL

    def tick(self, now: float) -> Array:
        """Let the time since the last tick pass; return the share of it that each was busy."""
        seconds = now - self._now
        running = self._busy * (now - self._since)
        share = np.minimum((self._busy_s + running) / seconds, 1.0)
        self._since[:] = now
        self._busy_s[:] = 0.0
        self._now = now
        dynamic = (self.load_w - self.idle_w) * share * self.duty * self.clock**_POWER_EXPONENT
        self.power_w = np.where(self.occupied, self.idle_w + dynamic, self.idle_w * _EMPTY)
        self.thermal.advance(self.power_w, seconds)
        self.temperature_c = self.thermal.temperature_c
        self.energy_j += np.where(self.occupied, self.power_w * seconds, 0.0)
        self._protect(seconds)
        self.throttled_s += np.where(self.occupied & self.throttled, seconds, 0.0)
        self.hottest_c = np.where(
            self.occupied, np.maximum(self.hottest_c, self.temperature_c), self.hottest_c
        )
        return share

    def _protect(self, seconds: float) -> None:
        above = self.temperature_c - self.limit_c
        self._slowed |= above >= 0
        if self._slowed.any():
            change = -_CLOCK_A_DEGREE_SECOND * seconds * (above + _HOLDS_BELOW_C)
            clock = np.clip(self._heat_clock + change, self._least_clock, 1.0)
            self._heat_clock = np.where(self._slowed, clock, 1.0)
            self._slowed &= (self._heat_clock < 1) | (above >= -_HOLDS_BELOW_C)
            self._braked |= self.temperature_c >= self._brake_c
            self._braked &= above > -_HOLDS_BELOW_C
        clock = np.minimum(self._heat_clock * np.where(self._braked, _BRAKE, 1.0), self._cap)
        self.clock = np.maximum(clock, self._least_clock)
