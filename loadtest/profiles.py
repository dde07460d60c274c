"""When requests come: the shapes of load, each an open loop with random (Poisson) arrivals.

A profile says how the rate changes over a run, not how high it is: its mean is 1, so that `rate`
is the mean of every profile and the same number of requests is due whichever is chosen. Rates are
constant by pieces; arrivals are a unit Poisson process whose time is stretched by the integral of
the rate (Cinlar 1975, "Introduction to Stochastic Processes", section 4.7), which is exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_RATE = 1000.0  # requests a second: beyond what one generator sends in time
LONGEST_S = 24 * 3600.0
REPLAY = "replay"


@dataclass(frozen=True)
class Piece:
    """A part of a run in which the rate does not change."""

    share: float  # of the duration
    rate: float  # relative to the run's mean


@dataclass(frozen=True)
class Profile:
    """A shape of load.

    Attributes:
        name: As `--profile` takes it.
        words: What it is like.
        pieces: In order; shares come to 1, and so does the mean rate.
    """

    name: str
    words: str
    pieces: tuple[Piece, ...]


def _scaled(shares: Sequence[float], rates: Sequence[float]) -> tuple[Piece, ...]:
    whole = math.fsum(shares)
    mean = math.fsum(s * r for s, r in zip(shares, rates, strict=True)) / whole
    return tuple(Piece(s / whole, r / mean) for s, r in zip(shares, rates, strict=True))


_QUARTER_HOURS = 96


def _day(quarter: int) -> float:
    # Quietest at 4, busiest at 16 o'clock, five times as much.
    return 1.0 - 2 / 3 * math.cos(2 * math.pi * ((quarter + 0.5) / _QUARTER_HOURS - 4 / 24))


PROFILES = {
    each.name: each
    for each in (
        Profile("steady", "the same rate throughout", _scaled((1,), (1,))),
        Profile(
            "step",
            "four stairs up: 0.4, 0.8, 1.2 and 1.6 times the rate",
            _scaled((1, 1, 1, 1), (0.4, 0.8, 1.2, 1.6)),
        ),
        Profile(
            "burst",
            "quiet at half the rate; three bursts, each a twelfth of the run, at 2.5 times it",
            _scaled((3, 1, 2, 1, 2, 1, 2), (0.5, 2.5, 0.5, 2.5, 0.5, 2.5, 0.5)),
        ),
        Profile(
            "diurnal",
            "a day in the time of the run: at 16 o'clock five times as much as at 4",
            _scaled((1,) * _QUARTER_HOURS, [_day(each) for each in range(_QUARTER_HOURS)]),
        ),
    )
}

NAMES = (*PROFILES, REPLAY)


def arrivals(profile: Profile, rate: float, duration_s: float, seed: int) -> list[float]:
    """Return when requests are due, in seconds from the beginning, rising.

    Args:
        profile: The shape.
        rate: Mean requests a second, above 0.
        duration_s: Of the run; nothing is due after it.
        seed: The same arguments give the same times.

    Raises:
        ValueError: Rate or duration is not a finite number above 0.
    """
    if not (0 < rate < math.inf and 0 < duration_s < math.inf):
        raise ValueError(f"rate {rate} and duration {duration_s} must be above 0 and finite")
    gaps = random.Random(f"arrivals {seed}")
    times: list[float] = []
    due = gaps.expovariate(1.0)  # in expected requests, not in seconds
    begin = done = 0.0
    for piece in profile.pieces:
        seconds, density = piece.share * duration_s, piece.rate * rate
        while due < done + seconds * density:
            times.append(min(begin + (due - done) / density, duration_s))
            due += gaps.expovariate(1.0)
        begin += seconds
        done += seconds * density
    return times
