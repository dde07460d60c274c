"""One page of a scenario: a column a policy, a row each for queue, replicas, heat and latency.

All panels of a row share one scale, so that columns can be compared by eye.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cluster.simulation.measures import Series

_PANEL_PX = (330, 130)
_LEFT_PX, _GAP_PX, _TOP_PX, _TITLE_PX, _BOTTOM_PX = 58, 46, 64, 22, 34
_LINE, _SECOND, _BAND, _HOT = "#1f5fbf", "#b9770e", "#f3c9b5", "#c0392b"
_INK, _GRID = "#222222", "#e2e2e2"


class _Row:
    """One kind of panel.

    Args:
        title: What it shows and in which unit.
        lines: Names of the series drawn, and their colours.
        band: Names of two series with the room between them filled.
    """

    def __init__(
        self, title: str, lines: tuple[tuple[str, str], ...], band: tuple[str, str] | None = None
    ) -> None:
        self.title = title
        self.lines = lines
        self.band = band

    @property
    def names(self) -> list[str]:
        """All series it draws."""
        return [name for name, _ in self.lines] + list(self.band or ())


_ROWS = (
    _Row("requests waiting", (("waiting", _LINE),)),
    _Row("denoisers: running, and held", (("held", _SECOND), ("replicas", _LINE))),
    _Row(
        "card temperature, C: 5 % to highest, median",
        (("temperature_c", _HOT),),
        ("temperature_low_c", "temperature_high_c"),
    ),
    _Row("cards throttled", (("throttled", _HOT),)),
    _Row("p95 latency, s", (("latency_p95_s", _LINE),)),
)


def draw_page(title: str, series: Mapping[str, Series]) -> Image.Image:
    """Draw runs of one scenario side by side.

    Args:
        title: Of the page.
        series: By policy, in the order of columns.

    Returns:
        RGB.
    """
    wide = _LEFT_PX + len(series) * (_PANEL_PX[0] + _GAP_PX)
    high = _TOP_PX + len(_ROWS) * (_PANEL_PX[1] + _TITLE_PX) + _BOTTOM_PX
    image = Image.new("RGB", (wide, high), "white")
    drawing = ImageDraw.Draw(image)
    drawing.text((_LEFT_PX, 10), title, _INK, ImageFont.load_default(size=17))
    for row_at, row in enumerate(_ROWS):
        low, up = _scale(row, series.values())
        for column, (policy, one) in enumerate(series.items()):
            left = _LEFT_PX + column * (_PANEL_PX[0] + _GAP_PX)
            top = _TOP_PX + row_at * (_PANEL_PX[1] + _TITLE_PX) + _TITLE_PX
            if row_at == 0:
                heading = ImageFont.load_default(size=15)
                drawing.text((left, _TOP_PX - 22), policy, _INK, heading)
            _panel(drawing, (left, top), row, one, (low, up), row_at == len(_ROWS) - 1)
    return image


def save_page(image: Image.Image, path: Path, title: str) -> None:
    """Write a page as PNG, or as HTML that holds it.

    Raises:
        OSError: It cannot be written.
    """
    if path.suffix == ".html":
        kept = io.BytesIO()
        image.save(kept, "PNG")
        data = base64.b64encode(kept.getvalue()).decode()
        head = f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title>'
        body = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">\n'
        path.write_text(head + body, encoding="utf-8")
    else:
        image.save(path, "PNG")


def _scale(row: _Row, series: object) -> tuple[float, float]:
    values = [
        value
        for one in series  # type: ignore[attr-defined]
        for name in row.names
        for value in getattr(one, name)
        if value is not None
    ]
    low = min(values, default=0.0) if row.band else 0.0
    up = max(values, default=1.0)
    return low, max(up, low + 1.0) * 1.04


def _panel(
    drawing: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    row: _Row,
    series: Series,
    scale: tuple[float, float],
    last: bool,
) -> None:
    font = ImageFont.load_default(size=12)
    (left, top), (wide, high), (low, up) = corner, _PANEL_PX, scale
    end = max(series.at_s[-1], 1.0) if series.at_s else 1.0

    def at(second: float, value: float) -> tuple[float, float]:
        return left + wide * second / end, top + high * (1 - (value - low) / (up - low))

    drawing.text((left, top - 16), row.title, _INK, font)
    for tick in _ticks(low, up, 4):
        y = at(0, tick)[1]
        drawing.line(((left, y), (left + wide, y)), fill=_GRID)
        drawing.text((left - 6, y), f"{tick:g}", _INK, font, anchor="rm")
    if row.band is not None:
        lower, upper = getattr(series, row.band[0]), getattr(series, row.band[1])
        outline = [at(*point) for point in zip(series.at_s, upper, strict=True)]
        outline += [at(*point) for point in zip(series.at_s, lower, strict=True)][::-1]
        if len(outline) > 2:
            drawing.polygon(outline, fill=_BAND)
    for name, color in row.lines:
        known = [
            at(second, value)
            for second, value in zip(series.at_s, getattr(series, name), strict=True)
            if value is not None
        ]
        drawing.line(known, fill=color, width=2)
    drawing.line(((left, top + high), (left + wide, top + high)), fill=_INK)
    if last:
        for tick in _ticks(0, end / 60, 6):
            x = at(tick * 60, low)[0]
            drawing.text((x, top + high + 5), f"{tick:g}", _INK, font, anchor="ma")
        drawing.text((left + wide, top + high + 18), "minutes", _INK, font, anchor="ra")


def _ticks(low: float, up: float, about: int) -> list[float]:
    span = max(up - low, 1e-9)
    power = 10.0 ** int(f"{span / about:e}".split("e")[1])
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / about)
    first = -(-low // step)
    return [round(step * at, 6) for at in range(int(first), int(up // step) + 1)]
