"""How warm a card gets: two first-order responses to its power, above the air that cools it.

The fast one is the die on its heat sink, the slow one the heat sink in the air stream. For power
that is constant over a span of time the solution is exact, whatever the span: each response goes
towards resistance x power with exp(-span / time constant). A fan that fails makes the way into
the air harder by a factor; the heat sink's capacity stays, so its time constant grows likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ThermalParameters:
    """Of one kind of card.

    Attributes:
        ambient_c: Of the air or water that reaches the card, degrees Celsius.
        die_resistance: Degrees per watt from die to heat sink.
        die_time_constant_s: How fast that part follows the power.
        air_resistance: Degrees per watt from heat sink to air.
        air_time_constant_s: How fast that part follows.

    Raises:
        ValueError: A resistance or time constant is not above 0.
    """

    ambient_c: float
    die_resistance: float
    die_time_constant_s: float
    air_resistance: float
    air_time_constant_s: float

    def __post_init__(self) -> None:
        positive = (
            self.die_resistance,
            self.die_time_constant_s,
            self.air_resistance,
            self.air_time_constant_s,
        )
        if not all(value > 0 for value in positive):
            raise ValueError(f"resistances and time constants must be above 0: {self}")

    def settled_c(self, power_w: float, hindrance: float = 1.0) -> float:
        """Return where the temperature ends under constant power."""
        return self.ambient_c + power_w * (self.die_resistance + self.air_resistance * hindrance)


class ThermalState:
    """Temperatures of many cards.

    Args:
        cards: The parameters of each card.
        power_w: Shape (cards,); every card starts settled at it.
    """

    def __init__(self, cards: list[ThermalParameters], power_w: Array) -> None:
        self._die_resistance = np.array([card.die_resistance for card in cards])
        self._die_s = np.array([card.die_time_constant_s for card in cards])
        self._air_resistance = np.array([card.air_resistance for card in cards])
        self._air_s = np.array([card.air_time_constant_s for card in cards])
        self.ambient_c = np.array([card.ambient_c for card in cards])
        self.hindrance = np.ones(len(cards))
        self._die = self._die_resistance * power_w
        self._air = self._air_resistance * power_w
        self._kept: dict[float, tuple[Array, Array]] = {}

    @property
    def temperature_c(self) -> Array:
        """Shape (cards,)."""
        return self.ambient_c + self._die + self._air

    def hinder(self, cards: NDArray[np.int64], factor: Array | float) -> None:
        """Make the way into the air harder for some cards; 1 is as built."""
        self.hindrance[cards] = factor
        self._kept.clear()

    def advance(self, power_w: Array, seconds: float) -> None:
        """Let time pass under constant power, shape (cards,)."""
        kept = self._kept.get(seconds)
        if kept is None:
            kept = (
                np.exp(-seconds / self._die_s),
                np.exp(-seconds / (self._air_s * self.hindrance)),
            )
            self._kept[seconds] = kept
        die, air = self._die_resistance * power_w, self._air_resistance * self.hindrance * power_w
        self._die = die + (self._die - die) * kept[0]
        self._air = air + (self._air - air) * kept[1]
