"""Line charts as inline SVG: no script, no font, no file, and in the page's own colours.

Colours are classes (`s0` to `s5`, `bad`, `grid`, `mark`), which the page's style sheet defines for
light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float | None]

_WIDE, _HIGH = 520, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26
_LABEL_HIGH = 14
_ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)
COLORS = 6


@dataclass(frozen=True)
class Series:
    """One quantity over x.

    Attributes:
        name: For the legend.
        points: By x, rising; a y of None interrupts the line.
        look: `line`, `stairs` (a value holds until the next), `dots`, or `area`.
        is_bad: Drawn in the colour of what ought not to be.
    """

    name: str
    points: Sequence[Point]
    look: str = "line"
    is_bad: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: With the unit of y.
        series: In the order of the legend; colours repeat after `COLORS`.
        x_unit: Behind the numbers of the x axis.
        levels: Horizontal marks: value and label.
        x_end: The axis goes at least so far.
    """

    title: str
    series: Sequence[Series]
    x_unit: str = " s"
    levels: Sequence[tuple[float, str]] = field(default=())
    x_end: float = 0.0


def svg(chart: Chart) -> str:
    """Return a chart as a `figure` with its legend; where nothing is known, it says so."""
    points = [(x, y) for one in chart.series for x, y in one.points if y is not None]
    title = escape(chart.title)
    if not points:
        return f'<figure><figcaption>{title}</figcaption><p class="none">not known</p></figure>'
    values = [y for _, y in points] + [level for level, _ in chart.levels]
    low, high, step = _axis(min([0.0, *values]), max(values))
    end = max([chart.x_end, *(x for x, _ in points)]) or 1.0
    across, up = _WIDE - _LEFT - _RIGHT, _HIGH - _TOP - _BOTTOM

    def x_of(x: float) -> float:
        return round(_LEFT + across * x / end, 1)

    def y_of(y: float) -> float:
        return round(_TOP + up * (1 - (y - low) / (high - low)), 1)

    parts = []
    for count in range(round((high - low) / step) + 1):
        value = low + count * step
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.6g}</text>')
    _, _, x_step = _axis(0.0, end)
    for count in range(int(end / x_step + 1e-9) + 1):
        at = count * x_step
        parts.append(
            f'<text x="{x_of(at)}" y="{_HIGH - 8}" text-anchor="middle">'
            f"{at:.6g}{escape(chart.x_unit) if count else ''}</text>"
        )
    for value, label in chart.levels:
        y = y_of(value)
        parts.append(f'<line class="mark" x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y}" y2="{y}"/>')
        beside = y - 4 if y > _TOP + _LABEL_HIGH else y + _LABEL_HIGH
        parts.append(f'<text class="label" x="{_LEFT + 4}" y="{beside}">{escape(label)}</text>')
    for index, one in enumerate(chart.series):
        drawn = [(x_of(x), None if y is None else y_of(y)) for x, y in one.points]
        parts.append(_drawn(one.look, drawn, _color(one, index), y_of(low)))
    legend = "".join(
        f'<span><i class="{_color(one, index)}"></i>{escape(one.name)}</span>'
        for index, one in enumerate(chart.series)
        if len(chart.series) > 1
    )
    return (
        f'<figure><figcaption>{title}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _color(series: Series, index: int) -> str:
    return "bad" if series.is_bad else f"s{index % COLORS}"


def _drawn(look: str, points: Sequence[Point], color: str, ground: float) -> str:
    if look == "dots":
        return "".join(
            f'<circle class="{color}" cx="{x}" cy="{y}" r="2"/>' for x, y in points if y is not None
        )
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            runs.append([])
        else:
            if look == "stairs" and runs[-1]:
                runs[-1].append((x, runs[-1][-1][1]))
            runs[-1].append((x, y))
    drawn = []
    for run in filter(None, runs):
        line = "M" + "L".join(f"{x} {y}" for x, y in run)
        if look == "area":
            area = f"{line}L{run[-1][0]} {ground}L{run[0][0]} {ground}Z"
            drawn.append(f'<path class="area {color}" d="{area}"/>')
        drawn.append(f'<path class="line {color}" d="{line}"/>')
    return "".join(drawn)


def _axis(low: float, high: float) -> tuple[float, float, float]:
    """Return the ends of an axis and the distance of its ticks: round numbers, about five."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * each for each in _ROUND if power * each >= span / 5 * (1 - 1e-9))
    begin, end = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return begin, end if end > begin else begin + step, step
