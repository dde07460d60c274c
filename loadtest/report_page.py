"""A load test's report as one HTML file that needs nothing else: no script, no network.

What it shows is in the JSON beside it as well; charts and pictures are only here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from loadtest.report_words import card_rows, findings, tiles
from loadtest.svg_chart import Chart, svg

_THUMBNAIL_PX = 256
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PERCENTILES = ("p50", "p90", "p95", "p99", "max")


def page(
    report: Mapping[str, Any],
    charts: Sequence[Chart],
    pictures: Sequence[tuple[str, Path]],
) -> str:
    """Return the page.

    Args:
        report: As it goes into JSON.
        charts: Of the run.
        pictures: Caption and file of each to be shown.
    """
    run, figures = report["run"], report["figures"]
    title = f"Load test: {run['profile']} on {run['model']}"
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    warnings = "".join(f'<p class="warning">{escape(each)}</p>' for each in findings(report))
    sections = [
        f'<h1>{escape(title)}</h1><p class="faint">{escape(_summary(run, figures))}</p>',
        warnings,
        _tiles(report),
        f'<h2>Over time</h2><div class="charts">{"".join(map(svg, charts))}</div>',
        f'<h2>In figures</h2><div class="tables">{_tables(report)}</div>',
        _sheet(pictures, figures.get("adherence")),
        f"<h2>How to get this again</h2><p><code>{escape(run['command'])}</code></p>"
        f'<p class="faint">{escape(_provenance(run))}</p>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Without one, browsers ask the server for /favicon.ico.
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>"
    )


def _summary(run: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    return (
        f"{run['requests']} requests in {run['duration_s']:g} s through {', '.join(run['doors'])}; "
        f"mix {run['mix']}; {figures['distinct_prompts']} different prompts ({run['prompts']}), no "
        "picture twice. An open loop: nobody waits for another's answer, and latency counts from "
        "when a request was due."
    )


def _provenance(run: Mapping[str, Any]) -> str:
    machine = "; ".join(f"{name}: {value}" for name, value in run["machine"].items())
    return f"{run['date']}. The generator's machine: {machine}."


def _tiles(report: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<div class="tile"><dt>{escape(tile.name)}</dt><dd class="{tile.mood}">'
        f"{escape(tile.value)}<small> {escape(tile.unit)}</small></dd>"
        f"<p>{escape(tile.words)}</p></div>"
        for tile in tiles(report)
    )
    return f'<dl class="tiles">{cells}</dl>'


def _tables(report: Mapping[str, Any]) -> str:
    figures, generator = report["figures"], report["generator"]
    latency = [("latency", figures["latency_s"]), ("waited in replicas", figures["queue_s"])]
    latency.append(("accepted to published", figures["server_s"]))
    panels = [
        _spreads("Seconds", ((name, None, spread) for name, spread in latency)),
        _spreads(
            "By door, seconds",
            ((name, each["right"], each["latency_s"]) for name, each in figures["doors"].items()),
        ),
        _spreads(
            "By steps, seconds",
            (
                (f"{steps} steps", each["right"], each["latency_s"])
                for steps, each in figures["steps"].items()
            ),
        ),
        _panel(
            "Not answered with a picture",
            ("error", "requests"),
            figures["errors"].items() or [("none", "")],
        ),
        _panel(
            "The generator's lateness, ms",
            ("", "requests", "p50", "p99", "most"),
            [
                [name, *(each.get(key, "") for key in ("requests", "p50_ms", "p99_ms", "most_ms"))]
                for name, each in (
                    ("this run", figures["lateness"]),
                    (f"{generator['rate']:g}/s, instant server", generator),
                )
            ],
        ),
        _panel(
            "Replicas that answer, by pool",
            ("pool", "least", "most"),
            [[pool, *each.values()] for pool, each in figures["replicas"].items()]
            or [(figures.get("status_problem") or "not known", "", "")],
        ),
        _panel("Cards and energy", ("", ""), card_rows(figures)),
    ]
    return "".join(panels)


def _spreads(title: str, rows: Iterable[tuple[str, int | None, Mapping[str, float] | None]]) -> str:
    cells = [
        [name, "" if count is None else count]
        + [f"{spread[part]:.3g}" if spread else "" for part in _PERCENTILES]
        for name, count, spread in rows
    ]
    return _panel(title, ("", "pictures", *_PERCENTILES), cells)


def _panel(title: str, head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    top = "".join(f"<th>{escape(each)}</th>" for each in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<section class="panel"><h3>{escape(title)}</h3>'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _sheet(pictures: Sequence[tuple[str, Path]], adherence: Mapping[str, Any] | None) -> str:
    if not pictures:
        return ""
    items = "".join(
        f'<li><img alt="{escape(caption)}" src="{_thumbnail(file)}">'
        f'<span title="{escape(caption)}">{escape(caption)}</span>'
        "</li>"
        for caption, file in pictures
    )
    said = ""
    if adherence and adherence["judged"]:
        said = (
            f'<p class="faint">{adherence["right"]} of {adherence["judged"]} pictures that were '
            f"looked at show all that their prompts state ({adherence['from']:.0%} to "
            f"{adherence['to']:.0%}, 95 %).</p>"
        )
    return f'<h2>Pictures of this run</h2>{said}<ul class="sheet">{items}</ul>'


def _thumbnail(file: Path) -> str:
    with Image.open(file) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
        data = io.BytesIO()
        small.save(data, "WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")
