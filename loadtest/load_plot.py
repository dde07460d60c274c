"""Draws p95 latency against load: one panel a model and mix, one line an arm."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from loadtest.engine_cells import KELVIN

_PANEL_PX, _MARGIN_PX = (300, 220), (52, 40)
_COLORS = ("#c0392b", "#444444", "#1f5fbf", "#2e8b57", "#8e44ad", "#b9770e")
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_MOST_OF_KELVIN = 6.0  # an arm beyond capacity would flatten all others


def draw_plot(report: dict[str, Any]) -> Image.Image:
    """Draw the cells of a report of `loadtest.engine_bench`.

    Returns:
        RGB; seconds on a logarithmic scale over load. What is far above Kelvin leaves the panel.
    """
    places = [(full["model"], full["mix"]) for full in report["saturated"]]
    columns = len({mix for _, mix in places})
    rows = -(-len(places) // columns)
    step = (_PANEL_PX[0] + _MARGIN_PX[0] + 14, _PANEL_PX[1] + 2 * _MARGIN_PX[1])
    image = Image.new("RGB", (columns * step[0] + 8, rows * step[1] + 20), "white")
    drawing = ImageDraw.Draw(image)
    arms = list(report["cells"][0]["arms"])
    for index, (model, mix) in enumerate(places):
        corner = (index % columns * step[0], index // columns * step[1])
        cells = [one for one in report["cells"] if (one["model"], one["mix"]) == (model, mix)]
        _panel(drawing, corner, f"{model}, {mix}: p95 s over load", cells, arms)
    for index, name in enumerate(arms):
        place = (_MARGIN_PX[0] + 130 * index, rows * step[1])
        drawing.text(place, name, _COLORS[index % len(_COLORS)], ImageFont.load_default(size=13))
    return image


def _panel(
    drawing: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    title: str,
    cells: list[dict[str, Any]],
    arms: list[str],
) -> None:
    font = ImageFont.load_default(size=12)
    left, top = corner[0] + _MARGIN_PX[0], corner[1] + _MARGIN_PX[1]
    wide, high = _PANEL_PX
    loads = [one["load"] for one in cells]
    values = [one["arms"][name]["p95"] for one in cells for name in arms]
    most = _MOST_OF_KELVIN * max(one["arms"][KELVIN]["p95"] for one in cells)
    low, up = math.log(min(values) * 0.9), math.log(min(max(values) * 1.1, most))
    first, last = min(loads) - 0.03, max(loads) + 0.03

    def at(load: float, seconds: float) -> tuple[float, float]:
        height = (math.log(seconds) - low) / (up - low)
        return left + wide * (load - first) / (last - first), top + high * (1 - min(height, 1.0))

    drawing.text((left, corner[1] + 16), title, "black", font)
    for tick in _TICKS:
        if low <= math.log(tick) <= up:
            y = at(first, tick)[1]
            drawing.line(((left, y), (left + wide, y)), fill="#dddddd")
            drawing.text((left - 6, y), f"{tick:g}", "black", font, anchor="rm")
    for load in loads:
        drawing.text((at(load, 1.0)[0], top + high + 6), f"{load:.0%}", "black", font, anchor="ma")
    # Kelvin last, so that it lies on top.
    for index, name in reversed(list(enumerate(arms))):
        points = [at(one["load"], one["arms"][name]["p95"]) for one in cells]
        color = _COLORS[index % len(_COLORS)]
        drawing.line(points, fill=color, width=3 if name == KELVIN else 2)
        for x, y in points:
            drawing.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
