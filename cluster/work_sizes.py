"""How much work a picture is on a pool, learnt from what the pool's replicas say of finished ones.

A replica that finished a picture tells its cool seconds. A step of one size and guidance costs the
same whatever the request, so the next picture of that size is known before it is sent. Of what was
never seen nothing is said: the routing then takes the mean of what came before. Whoever must know
asks for a guess.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import NamedTuple

_SMOOTHING = 0.3
_MOST_SIZES = 256


class Asked(NamedTuple):
    """A kind of work as requests ask for it, before anything of it is done.

    Attributes:
        what: `step` of a picture, `prompts` of a request or `picture` to decode.
        size: Pixels times rows, or prompts; of two kinds of a thing the larger takes longer, about
            in proportion.
    """

    what: str
    size: int


def asked_prompts(number: int) -> Asked:
    """Return the kind of a text stage's call."""
    return Asked("prompts", number)


def asked_steps(width: int, height: int, rows: int) -> Asked:
    """Return the kind of a picture's steps; sides in pixels, 2 rows with guidance."""
    return Asked("step", width * height * rows)


def asked_picture(width: int, height: int) -> Asked:
    """Return the kind of a picture to decode; sides in pixels."""
    return Asked("picture", width * height)


class WorkSizes:
    """Cool seconds of a step, by kind of picture. Thread-safe."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._step_s: dict[Hashable, float] = {}

    def learn(self, kind: Hashable, steps: int, cool_s: float) -> None:
        """Take note of a finished picture.

        Args:
            kind: What the cost of a step depends on.
            steps: That it took.
            cool_s: Of all of them.
        """
        if steps < 1 or not cool_s > 0:
            return
        with self._guard:
            before = self._step_s.pop(kind, cool_s / steps)
            self._step_s[kind] = before + _SMOOTHING * (cool_s / steps - before)
            if len(self._step_s) > _MOST_SIZES:
                del self._step_s[next(iter(self._step_s))]  # the one not seen for longest

    def cool_s(self, kind: Hashable, steps: int) -> float | None:
        """Return the work of a picture; None: none of its kind was seen."""
        with self._guard:
            step_s = self._step_s.get(kind)
        return None if step_s is None else step_s * steps

    def asked_s(self, kind: Asked) -> float | None:
        """Return the work of a step or a call, guessed from the kind most like it if need be.

        Returns:
            Cool seconds; None: no such thing was seen, of whatever size.
        """
        with self._guard:
            known = self._step_s.get(kind)
            if known is not None:
                return known
            others = [
                (max(other.size, kind.size) / min(other.size, kind.size), other)
                for other in self._step_s
                if isinstance(other, Asked) and other.what == kind.what
            ]
            if not others:
                return None
            _, nearest = min(others)
            return self._step_s[nearest] * kind.size / nearest.size
