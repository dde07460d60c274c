"""Which of a driver's answers to believe, and what a card did not tell, in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cluster.nvml_device import NvmlGone, NvmlSilence

HOTTEST_C = 200.0
"""No card that still answers is hotter; beyond lie 0xFFFFFFFF and its like."""


class Questions:
    """One round of questions to a card, and why some of them stayed open."""

    def __init__(self) -> None:
        self._open: dict[str, str] = {}

    def first(self, what: str, *asks: Callable[[], float]) -> float | None:
        """Return the first answer that comes; None, and a problem under that name, if none does.

        Raises:
            NvmlGone: There is no card to ask.
        """
        reasons: list[str] = []
        for ask in asks:
            try:
                return ask()
            except NvmlGone:
                raise
            except NvmlSilence as silence:
                reasons.append(str(silence))
        self.leave_open(what, "; ".join(dict.fromkeys(reasons)))
        return None

    def leave_open(self, what: str, reason: str) -> None:
        """Note a problem."""
        self._open[what] = reason

    @property
    def problems(self) -> tuple[str, ...]:
        """What stayed open and why."""
        return tuple(f"{what}: {reason}" for what, reason in self._open.items())


def answer_or_none(ask: Callable[[], float]) -> float | None:
    """Return the answer, or None if it does not come.

    Raises:
        NvmlGone: There is no card to ask.
    """
    try:
        return ask()
    except NvmlGone:
        raise
    except NvmlSilence:
        return None


def number(answer: Any, least: float, most: float, scale: float = 1.0) -> float:
    """Return the answer in the scaled unit.

    Raises:
        NvmlSilence: It is not a number, or not one between least and most (in the scaled unit).
    """
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        scaled = answer * scale
        if least <= scaled <= most:
            return scaled
    raise NvmlSilence(f"the driver says {answer!r}, which cannot be", lasting=False)


def bits(answer: Any) -> int:
    """Return a mask of bits.

    Raises:
        NvmlSilence: It is not one, or all 32 or 64 bits are set.
    """
    is_integer = isinstance(answer, int) and not isinstance(answer, bool)
    if is_integer and 0 <= answer < 2**64 - 1 and answer != 2**32 - 1:
        return int(answer)
    raise NvmlSilence(f"the driver says {answer!r}, which cannot be", lasting=False)
