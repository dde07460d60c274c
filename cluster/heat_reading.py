"""What is known of one card's heat at one moment, and who tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

THROTTLING = 0x08 | 0x20 | 0x40 | 0x80
"""Clocks-event reasons that mean throttling: hardware slowdown, software thermal slowdown, hardware
thermal slowdown, power brake. 0x04, the software power cap, is a busy H100's normal state and not
among them. NVML warns that 0x08 may also show for a moment while the clocks change."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a card. None: this card does not say.

    Attributes:
        at: `time.monotonic()` of the process that read.
        temperature_c: Of the GPU, degrees Celsius.
        memory_temperature_c: Of its memory.
        margin_c: Degrees to the first temperature, of GPU or memory, at which the card slows itself
            down; below 0 beyond it.
        power_w: Watts of the whole card.
        power_cap_w: What the card may draw now.
        energy_j: Joules of the whole card since its driver came; only differences mean anything.
        sm_clock_mhz: Clock of the multiprocessors.
        clocks_event_reasons: NVML's bits; which of them are throttling says `THROTTLING`.
        source: `scripted` is a rehearsal, and whatever shows this reading must say so.
        problems: What this card does not tell, or tells for more than itself, in words.
        slowdown: How many times as long each forward shall take: the rehearsal of a throttled card.
            Always 1 unless `source` is `scripted`.
    """

    at: float
    temperature_c: float | None = None
    memory_temperature_c: float | None = None
    margin_c: float | None = None
    power_w: float | None = None
    power_cap_w: float | None = None
    energy_j: float | None = None
    sm_clock_mhz: float | None = None
    clocks_event_reasons: int | None = None
    source: Literal["nvml", "scripted"] = "nvml"
    problems: tuple[str, ...] = ()
    slowdown: float = 1.0

    @property
    def is_throttling(self) -> bool:
        """Whether the card says that it is being slowed down; False where it says nothing."""
        return bool((self.clocks_event_reasons or 0) & THROTTLING)

    @property
    def limit_c(self) -> float | None:
        """The GPU temperature at which the margin would be gone, all else staying as it is."""
        if self.temperature_c is None or self.margin_c is None:
            return None
        return self.temperature_c + self.margin_c


class HeatSource(Protocol):
    """Tells of one card when asked. `read` never raises; one thread at a time may call it."""

    @property
    def description(self) -> str:
        """Where the readings come from, for people."""

    @property
    def problem(self) -> str | None:
        """Why the last `read` gave nothing, in words; None if it gave something."""

    def read(self) -> Reading | None:
        """Look now. None while there is nothing to be had, as when the driver is away."""
