"""Draws what was read over time: panels above one another, phases shaded, moments marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_WIDE, _HIGH = 900, 130
_LEFT, _RIGHT, _TOP, _BETWEEN = 64, 60, 40, 26
_SHADES = ("#ffffff", "#fff3e0", "#e8f5e9", "#e3f2fd")
_COLORS = ("#c0392b", "#1f5fbf", "#2e8b57", "#8e44ad")
_LABEL_ROWS, _LABEL_HIGH = 6, 14
_ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Panel:
    """One quantity.

    Attributes:
        title: With its unit.
        lines: Name -> values, one for each time; None is left out.
        levels: Horizontal marks: (value, label).
    """

    title: str
    lines: dict[str, Sequence[float | None]]
    levels: Sequence[tuple[float, str]] = ()


def draw_trace(
    seconds: Sequence[float],
    panels: Sequence[Panel],
    phases: Sequence[tuple[float, str]],
    marks: Sequence[tuple[float, str]] = (),
) -> Image.Image:
    """Return an RGB picture.

    Args:
        seconds: Of each value, rising.
        panels: From top to bottom.
        phases: When each began, and its name.
        marks: When something happened, and what.
    """
    top = _TOP + (_LABEL_ROWS * _LABEL_HIGH if marks else 0)
    image = Image.new(
        "RGB",
        (_LEFT + _WIDE + (20 if not marks else 80), top + len(panels) * (_HIGH + _BETWEEN) + 16),
        "white",
    )
    drawing = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=12)
    last = max(seconds)

    def x(at: float) -> float:
        return _LEFT + _WIDE * at / last

    bottom = top + len(panels) * (_HIGH + _BETWEEN) - _BETWEEN
    ends = [at for at, _ in phases[1:]] + [last]
    for index, ((at, name), end) in enumerate(zip(phases, ends, strict=True)):
        drawing.rectangle((x(at), top, x(end), bottom), fill=_SHADES[index % len(_SHADES)])
        drawing.text((x(at) + 4, 6), name, "black", font)
    for index, (at, name) in enumerate(marks):
        row = 6 + _LABEL_HIGH * (1 + index % _LABEL_ROWS)
        drawing.line(((x(at), row), (x(at), bottom)), fill="#aaaaaa")
        drawing.text((x(at) + 3, row), name, "black", font)
    step = _tick(last / 10)
    for count in range(int(last / step) + 1):
        drawing.text((x(count * step), bottom + 4), f"{count * step:g} s", "black", font, "ma")
    for index, panel in enumerate(panels):
        _draw_panel(drawing, panel, top + index * (_HIGH + _BETWEEN), seconds, x)
    return image


def _draw_panel(
    drawing: ImageDraw.ImageDraw,
    panel: Panel,
    top: int,
    seconds: Sequence[float],
    x: Callable[[float], float],
) -> None:
    font = ImageFont.load_default(size=12)
    right = x(max(seconds))
    values = [v for line in panel.lines.values() for v in line if v is not None]
    values += [level for level, _ in panel.levels]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    step = _tick((high - low or abs(high) or 1.0) / 4)
    low, high = math.floor(low / step) * step, math.ceil(high / step + 1e-9) * step
    high = high if high > low else low + step

    def y(value: float) -> float:
        return float(top + _HIGH * (1 - (value - low) / (high - low)))

    for count in range(round((high - low) / step) + 1):
        value = low + count * step
        drawing.line(((_LEFT, y(value)), (right, y(value))), fill="#cccccc")
        drawing.text((_LEFT - 6, y(value)), f"{value:g}", "black", font, anchor="rm")
    for value, label in panel.levels:
        drawing.line(((_LEFT, y(value)), (right, y(value))), fill="black", width=1)
        drawing.text((_LEFT + 4, y(value) - 2), label, "black", font, anchor="lb")
    for index, line in enumerate(panel.lines.values()):
        points = [(x(at), y(v)) for at, v in zip(seconds, line, strict=True) if v is not None]
        if len(points) > 1:
            drawing.line(points, fill=_COLORS[index % len(_COLORS)], width=2)
    place = float(_LEFT)
    drawing.text((place, top - 16), panel.title, "black", font)
    place += drawing.textlength(panel.title, font) + 14
    if len(panel.lines) > 1:
        for index, name in enumerate(panel.lines):
            drawing.text((place, top - 16), name, _COLORS[index % len(_COLORS)], font)
            place += drawing.textlength(name, font) + 14


def _tick(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * each for each in _ROUND if power * each >= least * (1 - 1e-9))
