"""Keeps one card under a temperature by letting it compute for a share of the time only.

A pause between two steps is the lever that counts: two rows of Large already draw all that an H100
may draw, so fewer rows a forward cool nothing by themselves. They only make forwards short, so
that pauses come often and the temperature ripples less.

The control is proportional-integral with four provisions. A die warms and cools by 10 C within one
step and one pause, so a single reading says little: readings are averaged over some seconds. Far
below the target the integral forgets, so that a cold card starts at full speed and none of that
time is held against it. Near the target the share begins to fall before the target is reached. And
when the card's own protection sets in, nothing is awaited: the share is cut at once and given back
slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Stable, without oscillation worth the name, for cards whose temperature rises by 10 to 60 C from
# idle to full power, at once or over a minute (`tests/unit/test_governor.py`).
_PROPORTIONAL = 0.06  # of the time, for each degree
_INTEGRAL = 0.008  # of the time, for each degree and second
_RESTING = 0.75  # the integral of a card that has room: it slows down from 4 C below the target on
_AVERAGED_OVER_S = 3.0
_FORGETS_IN_S = 5.0
_CUT = 0.7  # of the share, each second that the card protects itself
_REGAINED = 0.01  # of the time, each second after that
_REGAINED_COOL = 0.05  # the same with room to spare
# So far from its limit a card protects itself against something else than its heat, or only seems
# to: NVML shows hardware slowdown for a moment while clocks change, as they do around a pause.
_ROOM_TO_SPARE_C = 10.0
_LONGEST_GAP_S = 5.0  # between readings, that the integral takes for one
# Below so much of the time no more rows a forward. Each costs Large at 1024x1024 a few per cent.
_ROWS = ((0.35, 2), (0.6, 4), (0.8, 8))


@dataclass(frozen=True)
class GovernorSettings:
    """How warm a card may get.

    Attributes:
        enabled: False leaves the card to its own protection.
        below_limit_c: Degrees to stay under the temperature at which the card slows itself down.
        target_c: To stay under, in degrees Celsius, instead of that.
        least_duty: Share of the time that is never taken away.
        throttled_duty: The same while the card slows itself down. It is held at its limit by its
            clock then, so pauses protect nothing; and clocks cost less than they save, since power
            falls faster than speed, while what pauses save they cost.

    Raises:
        ValueError: A setting that makes no sense.
    """

    enabled: bool = True
    below_limit_c: float = 5.0
    target_c: float | None = None
    least_duty: float = 0.1
    throttled_duty: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.least_duty <= 1:
            raise ValueError(f"least_duty must be above 0 and at most 1, is {self.least_duty}")
        if not self.least_duty <= self.throttled_duty <= 1:
            raise ValueError(
                f"throttled_duty must be from least_duty to at most 1, is {self.throttled_duty}"
            )
        if not math.isfinite(self.below_limit_c):
            raise ValueError(f"below_limit_c must be finite, is {self.below_limit_c}")
        if self.target_c is not None and not math.isfinite(self.target_c):
            raise ValueError(f"target_c must be finite, is {self.target_c}")


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a card may do until the next reading.

    Attributes:
        duty: Share of the time that it may compute, above 0.
        most_rows: Of a forward; at least the two of one guided picture. None: as many as pay.
        reason: In words.
    """

    duty: float
    most_rows: int | None
    reason: str

    def pause_s(self, forward_s: float) -> float:
        """Return how long to do nothing after a forward that took so long."""
        return forward_s * (1 / self.duty - 1)


FREE = Allowance(1.0, None, "nothing is known of its heat")
IDLE = Allowance(1.0, None, "it has nothing to do")


class Governor:
    """Turns readings of one card into allowances. Not thread-safe.

    Args:
        settings: How warm it may get.
    """

    def __init__(self, settings: GovernorSettings = GovernorSettings()) -> None:
        self.settings = settings
        self.allowance = FREE
        self._integral = _RESTING
        self._ceiling = 1.0  # what the card's protection leaves
        self._last_at: float | None = None
        self._average_c: float | None = None
        self._was_throttled = False

    @property
    def at_rest(self) -> bool:
        """True while the card is free and nothing of the past holds it back."""
        return (
            self.allowance.duty == 1
            and self._ceiling == 1
            and abs(self._integral - _RESTING) < 1e-3
        )

    def observe(
        self,
        at: float,
        temperature_c: float | None,
        limit_c: float | None,
        throttled: bool,
        busy: bool = True,
    ) -> Allowance:
        """Take a reading and return what the card may do.

        Args:
            at: Seconds, never going back.
            temperature_c: Of the card; None or not finite: it does not say.
            limit_c: At which it slows itself down; likewise.
            throttled: It slows itself down now.
            busy: It computed since the last reading. An idle card is never held back further.
        """
        if not self.settings.enabled:
            self.allowance = Allowance(1.0, None, "the governor is off")
            return self.allowance
        elapsed = self._elapsed(at)
        target = self._target(limit_c)
        average = self._averaged(temperature_c, elapsed)
        spare = None if average is None or limit_c is None else limit_c - average
        is_far_below = self._is_far_below(temperature_c, limit_c)
        is_held = self._protect(throttled, spare, is_far_below, elapsed)
        if average is None or target is None:
            duty, reason = 1.0, FREE.reason
        else:
            duty = self._controlled(target - average, elapsed, busy)
            reason = f"{average:.0f} C, to stay under {target:.0f}"
        if is_held or self._ceiling < duty:
            reason = "the card slows itself down for heat" if throttled else "it did so just now"
        least = self.settings.throttled_duty if is_held else self.settings.least_duty
        duty = max(min(duty, self._ceiling), least)
        self.allowance = Allowance(duty, _most_rows(duty), reason)
        return self.allowance

    def _elapsed(self, at: float) -> float:
        if not math.isfinite(at):
            return 0.0
        last, self._last_at = self._last_at, at
        return 0.0 if last is None else max(at - last, 0.0)

    def _target(self, limit_c: float | None) -> float | None:
        if self.settings.target_c is not None:
            return self.settings.target_c
        if limit_c is None or not math.isfinite(limit_c):
            return None
        return limit_c - self.settings.below_limit_c

    def _averaged(self, temperature_c: float | None, elapsed: float) -> float | None:
        if temperature_c is None or not math.isfinite(temperature_c):
            self._average_c = None
        elif self._average_c is None:
            self._average_c = temperature_c
        else:
            new = 1 - math.exp(-elapsed / _AVERAGED_OVER_S)
            self._average_c += (temperature_c - self._average_c) * new
        return self._average_c

    def _is_far_below(self, temperature_c: float | None, limit_c: float | None) -> bool:
        """Whether average and present reading are both far below the limit.

        Out of the cold a die is at its limit long before its average is.
        """
        if temperature_c is None or limit_c is None or self._average_c is None:
            return False
        return limit_c - max(self._average_c, temperature_c) > _ROOM_TO_SPARE_C

    def _protect(
        self, throttled: bool, spare_c: float | None, is_far_below: bool, elapsed: float
    ) -> bool:
        """Lower or raise the ceiling; return whether the card holds itself at its limit now."""
        is_cool = spare_c is not None and spare_c > _ROOM_TO_SPARE_C
        believed = throttled and (self._was_throttled or not is_far_below)
        self._was_throttled = throttled
        if believed:
            # The first reading of it cuts at once, whatever time has passed.
            cut = _CUT ** min(max(elapsed, 0.5), _LONGEST_GAP_S)
            self._ceiling = min(self._ceiling, self.allowance.duty) * cut
            self._ceiling = max(self._ceiling, self.settings.throttled_duty)
        elif not throttled:
            regained = (_REGAINED_COOL if is_cool else _REGAINED) * elapsed
            self._ceiling = min(self._ceiling + regained, 1.0)
        return believed

    def _controlled(self, room_c: float, elapsed: float, busy: bool) -> float:
        proportional = _PROPORTIONAL * room_c
        if proportional >= 1 - _RESTING:
            # So much room that even the resting integral gives all of the time.
            forgotten = 1 - math.exp(-elapsed / _FORGETS_IN_S)
            self._integral += (_RESTING - self._integral) * forgotten
        elif busy or room_c > 0:
            # No further than what the share can follow: the integral winds up in no direction.
            step = _INTEGRAL * room_c * min(elapsed, _LONGEST_GAP_S)
            least, most = self.settings.least_duty - proportional, 1 - proportional
            if step > 0:
                self._integral = max(self._integral, min(self._integral + step, most))
            else:
                self._integral = min(self._integral, max(self._integral + step, least))
        return min(max(proportional + self._integral, self.settings.least_duty), 1.0)


def _most_rows(duty: float) -> int | None:
    return next((rows for below, rows in _ROWS if duty < below), None)
