"""What a forward costs: measured seconds by token shape and rows, and guesses between them.

The schedule decides by these figures alone, so they must be those of the card at hand: a recording
(`loadtest.record_step_costs`) or the warm-up fills them in, and serving goes on observing. A guess
never claims more gain from batching than its neighbours show, and none where nothing is known.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from serve.errors import ConfigurationError

# Of the last forwards of one shape and row count; the median of nine shrugs off four outliers.
_REMEMBERED = 9
# Before anything was measured only the proportion matters: a small MMDiT on two cores.
_UNMEASURED_SECONDS_PER_TOKEN = 1e-5
_PATCH = 2  # a token is a 2 x 2 square of latents


@dataclass(frozen=True)
class TokenShape:
    """What rows of one forward have in common."""

    height: int  # of the latents
    width: int  # of the latents
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Length of one row's joint sequence."""
        return self.height * self.width // _PATCH**2 + self.text_tokens


class StepCosts:
    """Seconds of a forward, by shape and rows. Not thread-safe.

    Within a shape, rows between two measured counts are interpolated and more rows go on at the
    last slope. A shape never seen is interpolated by tokens between its neighbours; outside of
    them its rows count as so many rows of the nearest shape. With nothing measured at all, seconds
    are proportional to rows x tokens, so that no batching looks worth it.

    What was measured `in_proportion` tells what counts take beside each other, by a machine that
    was not itself then: counts not observed since are taken for as much faster as the others are.
    """

    def __init__(self) -> None:
        self._recent: dict[TokenShape, dict[int, deque[float]]] = {}
        self._in_proportion: dict[TokenShape, dict[int, float]] = {}
        self._curves: dict[TokenShape, tuple[list[int], list[float]]] = {}
        self._cache: dict[TokenShape, dict[int, float]] = {}
        self._prices: dict[tuple[TokenShape, int], tuple[float, ...]] = {}

    def observe(self, shape: TokenShape, rows: int, seconds: float) -> None:
        """Take note of one forward.

        The median of the last few counts, a recording being one of them.

        Raises:
            ValueError: rows or seconds is not positive and finite.
        """
        if rows < 1 or not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"a forward of {rows} rows in {seconds} s cannot be")
        recent = self._recent.setdefault(shape, {}).setdefault(rows, deque(maxlen=_REMEMBERED))
        recent.append(seconds)
        self._draw(shape)

    def observe_in_proportion(self, shape: TokenShape, by_rows: Mapping[int, float]) -> None:
        """Take note of the seconds that row counts took when they were timed in turns.

        Raises:
            ValueError: Rows or seconds are not positive and finite.
        """
        if not all(rows > 0 and 0 < seconds < math.inf for rows, seconds in by_rows.items()):
            raise ValueError(f"forwards cannot take so long, by rows: {by_rows}")
        self._in_proportion[shape] = dict(by_rows)
        self._draw(shape)

    def _draw(self, shape: TokenShape) -> None:
        """Make the curve of a shape anew."""
        curve = {count: median(each) for count, each in self._recent.get(shape, {}).items()}
        then = self._in_proportion.get(shape, {})
        faster = [curve[count] / seconds for count, seconds in then.items() if count in curve]
        now = median(faster) if faster else 1.0
        curve = {count: seconds * now for count, seconds in then.items()} | curve
        counts = sorted(curve)
        self._curves[shape] = (counts, [curve[count] for count in counts])
        self._cache.clear()
        self._prices.clear()

    def seconds(self, shape: TokenShape, rows: int) -> float:
        """Return what a forward of so many rows of this shape takes.

        Raises:
            ValueError: rows is not positive.
        """
        known = self._cache.get(shape)
        if known is None:
            known = self._cache[shape] = {}
        found = known.get(rows)
        if found is None:
            if rows < 1:
                raise ValueError(f"a forward of {rows} rows cannot be")
            found = known[rows] = self._guess(shape, rows)
        return found

    def prices(self, shape: TokenShape, most_rows: int) -> tuple[float, ...]:
        """Return the seconds a row costs in a forward of 1, 2, ... `most_rows` rows."""
        found = self._prices.get((shape, most_rows))
        if found is None:
            found = tuple(self.seconds(shape, rows) / rows for rows in range(1, most_rows + 1))
            self._prices[shape, most_rows] = found
        return found

    def stretched(self, factor: float) -> StepCosts:
        """Return these costs with every forward so many times as long; a view for deciding by.

        Raises:
            ValueError: factor is not positive.
        """
        if factor == 1:
            return self
        if factor <= 0:
            raise ValueError(f"forwards cannot take {factor} times as long")
        return _Stretched(self, factor)

    def is_measured(self, shape: TokenShape, rows: int) -> bool:
        """True if a forward of exactly this kind was recorded or observed."""
        return rows in self._recent.get(shape, ()) or rows in self._in_proportion.get(shape, ())

    def _guess(self, shape: TokenShape, rows: int) -> float:
        if not self._curves:
            return rows * shape.tokens * _UNMEASURED_SECONDS_PER_TOKEN
        if shape in self._curves:
            return _along(self._curves[shape], rows)
        by_tokens = sorted(self._curves, key=lambda known: (known.tokens, known.height))
        place = bisect_left([known.tokens for known in by_tokens], shape.tokens)
        if place == len(by_tokens) or (place == 0 and by_tokens[0].tokens > shape.tokens):
            nearest = by_tokens[min(place, len(by_tokens) - 1)]
            return _along(self._curves[nearest], rows * shape.tokens / nearest.tokens)
        above = by_tokens[place]
        if above.tokens == shape.tokens:
            return _along(self._curves[above], rows)
        below = by_tokens[place - 1]
        share = (shape.tokens - below.tokens) / (above.tokens - below.tokens)
        less = _along(self._curves[below], rows)
        return less + share * (_along(self._curves[above], rows) - less)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads: one entry for each shape and row count.

        Counts that were only timed in proportion are there as `seconds` has them.
        """
        return {
            "costs": [
                {
                    "height": shape.height,
                    "width": shape.width,
                    "text_tokens": shape.text_tokens,
                    "rows": rows,
                    "seconds": seconds,
                }
                for shape, curve in sorted(
                    self._curves.items(), key=lambda item: (item[0].tokens, item[0].height)
                )
                for rows, seconds in zip(*curve, strict=True)
            ]
        }

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any]) -> StepCosts:
        """Read a recording; fields beside `costs` say where it comes from and are not used.

        Raises:
            ConfigurationError: It is no recording.
        """
        costs = cls()
        try:
            for entry in recorded["costs"]:
                shape = TokenShape(
                    int(entry["height"]), int(entry["width"]), int(entry["text_tokens"])
                )
                costs.observe(shape, int(entry["rows"]), float(entry["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"This is no recording of step costs: {error!r}") from error
        return costs


class _Stretched(StepCosts):
    def __init__(self, costs: StepCosts, factor: float) -> None:
        super().__init__()
        self._costs, self._factor = costs, factor

    def seconds(self, shape: TokenShape, rows: int) -> float:
        return self._costs.seconds(shape, rows) * self._factor

    def prices(self, shape: TokenShape, most_rows: int) -> tuple[float, ...]:
        return tuple(price * self._factor for price in self._costs.prices(shape, most_rows))


def _along(curve: tuple[list[int], list[float]], rows: float) -> float:
    """Return the seconds of so many rows (a fraction, too) along one shape's measured counts."""
    counts, seconds = curve
    place = bisect_left(counts, rows)
    if place < len(counts) and counts[place] == rows:
        return seconds[place]
    if len(counts) == 1:
        return seconds[0] * rows / counts[0]
    left = min(max(place - 1, 0), len(counts) - 2)
    run = counts[left + 1] - counts[left]
    slope = (seconds[left + 1] - seconds[left]) / run
    along = seconds[left] + slope * (rows - counts[left])
    if place == 0:
        # Fewer rows than ever measured: never dearer, and never a better price a row.
        return min(max(along, seconds[0] * rows / counts[0]), seconds[0])
    if place == len(counts):
        # More rows than ever measured: never cheaper, and never a better price a row.
        return max(along, seconds[-1] * rows / counts[-1])
    return along
