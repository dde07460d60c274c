"""The line of those who were told to come again, where a request's front door keeps it.

The door says of each request that it lets through whether it comes in its turn, how much others
are expected to bring about now, and how many it has refused since it last said so, to be counted
where all is counted; a refusal says how long there is no room. It keeps the line because
it refuses most of an overload by itself (`serve.http.early_refusal`), and a Pipeline knows nothing
of those. What comes by handle stands in the Pipeline's own line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from cluster.load_shedder import Refusal
from cluster.places import room_beside

LINE_HEADER: Final = b"x-kelvin-line"
"""Of a request, by its front door: `turn expected_s refused`. Of a refusal: `wait_s busy_s`."""

_line: ContextVar[OutsideLine | None] = ContextVar("line", default=None)


class OutsideLine:
    """What its front door says of one request.

    Args:
        is_turn: It was told to come now.
        expected_s: Seconds of work that those bring who were told so.
        refused: How many others it has refused by itself.

    Attributes:
        refused: The same.
        refusal: For the front door; None: it was not refused for want of time.
    """

    def __init__(self, is_turn: bool, expected_s: float, refused: int = 0) -> None:
        self._is_turn = is_turn
        self._expected_s = expected_s
        self.refused = refused
        self.refusal: Refusal | None = None

    @staticmethod
    def from_header(value: str) -> OutsideLine | None:
        """Return what a header says; None: it says nothing that could be meant."""
        numbers = _numbers(value)
        if len(numbers) != 3:
            return None
        return OutsideLine(numbers[0] > 0, numbers[1], int(numbers[2]))

    def to_header(self) -> str:
        """Return what `from_header` reads."""
        return f"{self._is_turn:d} {self._expected_s:.4f} {self.refused}"

    def room(self, whole: float) -> float:
        """Return how much of some room is open to the request; seconds."""
        return whole if self._is_turn else room_beside(whole, self._expected_s)

    def refuse(self, wait_s: float, busy_s: float) -> float:
        """Leave the request to the line outside, and return for how long there is no room."""
        self.refusal = Refusal(wait_s, busy_s)
        return max(wait_s, 1.0)


def refusal_to_header(refusal: Refusal) -> str:
    """Return what `refusal_from_header` reads."""
    return f"{refusal.wait_s:.4f} {refusal.busy_s:.4f}"


def refusal_from_header(value: str) -> Refusal | None:
    """Return what a header says of a refusal; None: nothing that could be meant."""
    numbers = _numbers(value)
    return Refusal(numbers[0], numbers[1]) if len(numbers) == 2 else None


def line_outside() -> OutsideLine | None:
    """Return what its front door says of the request that is being served; None: nothing."""
    return _line.get()


@contextmanager
def standing_in(line: OutsideLine | None) -> Iterator[None]:
    """Serve a request of which its front door has said this."""
    token = _line.set(line)
    try:
        yield
    finally:
        _line.reset(token)


def _numbers(value: str) -> list[float]:
    try:
        numbers = [float(number) for number in value.split(" ")]
    except ValueError:
        return []
    are_sound = all(math.isfinite(number) and number >= 0 for number in numbers)
    return numbers if are_sound else []
