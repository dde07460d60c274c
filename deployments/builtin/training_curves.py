"""Condenses the logs of training runs and draws their curves, so that the next run can compare.

    python -m deployments.builtin.training_curves --out DIR NAME=DIR/log.jsonl ...

writes ``curves.json`` and ``curves.png``; runs that a ``curves.json`` there has already stay in it,
before the new ones. Only what differs from run to run stays: options, the
autoencoder's and the transformer's curves, the adherence that was measured on the way.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_VAE_COLUMNS = ("step", "t", "loss", "ms_per_step")
_FLOW_COLUMNS = ("step", "elapsed_s", "loss", "norm", "factor", "ms_per_step")
_NOT_OPTIONS = ("out", "device", "resume", "init", "vae_from")  # places on some machine
_PANEL_PX, _MARGIN_PX = (520, 300), (56, 34)
_COLORS = ("#1f5fbf", "#c0392b", "#2e8b57", "#8e44ad", "#b9770e", "#444444")


def condense(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is worth keeping of one run's ``log.jsonl``, in its order."""
    start = records[0]
    options = {k: v for k, v in start["options"].items() if k not in _NOT_OPTIONS}
    run: dict[str, Any] = {"torch": start["torch"], "device": start["device"], "options": options}
    for name, columns in (("vae", _VAE_COLUMNS), ("flow", _FLOW_COLUMNS)):
        rows = [[r[c] for c in columns] for r in records if r["event"] == name]
        if rows:
            run[name] = {"columns": list(columns), "rows": rows}
    run["events"] = [
        record
        for record in records
        if record["event"] not in ("start", "vae", "flow", "recorded", "checkpoint", "done")
    ]
    return run


def write_record(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Write runs as JSON with a row of numbers on each line, for diffs to be readable."""
    text = json.dumps(runs, indent=1)
    decoder, pieces, place = json.JSONDecoder(), [], 0
    while (begin := text.find('"rows": [', place)) >= 0:
        begin += len('"rows": ')
        rows, end = decoder.raw_decode(text, begin)
        pieces += [text[place:begin], "[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]"]
        place = end
    path.write_text("".join(pieces) + text[place:] + "\n", encoding="utf-8")


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw two panels over the transformer's steps: loss (logarithmic), and core adherence."""
    losses, adherence = {}, {}
    for name, run in runs.items():
        if "flow" not in run:
            continue
        losses[name] = [(row[0], math.log10(row[2])) for row in run["flow"]["rows"]]
        looks = [e for e in run["events"] if e["event"] == "adherence" and e["weights"] != "fp8"]
        adherence[name] = [(look["step"], look["core"]["all"]) for look in looks]
    width = 2 * (_PANEL_PX[0] + _MARGIN_PX[0]) + 20
    image = Image.new("RGB", (width, _PANEL_PX[1] + 2 * _MARGIN_PX[1] + 16), "white")
    drawing = ImageDraw.Draw(image)
    last = max((step for curve in losses.values() for step, _ in curve), default=1)
    decades = [(math.log10(v), f"{v:g}") for v in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)]
    shares = [(v / 5, f"{v / 5:g}") for v in range(6)]
    _panel(drawing, 0, "loss, by the run's own times", losses, decades, last)
    left = _PANEL_PX[0] + _MARGIN_PX[0]
    _panel(drawing, left, "core prompts all right", adherence, shares, last)
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def _panel(
    drawing: ImageDraw.ImageDraw,
    left: int,
    title: str,
    curves: dict[str, list[tuple[int, float]]],
    ticks: list[tuple[float, str]],
    last_step: int,
) -> None:
    font = ImageFont.load_default(size=12)
    x0, y0 = left + _MARGIN_PX[0], _MARGIN_PX[1]
    (wide, high), (low, top) = _PANEL_PX, (ticks[0][0], ticks[-1][0])

    def at(step: float, value: float) -> tuple[float, float]:
        return x0 + wide * step / last_step, y0 + high * (1 - (value - low) / (top - low))

    drawing.text((x0, 8), title, fill="black", font=font)
    for value, label in ticks:
        y = at(0, value)[1]
        drawing.line(((x0, y), (x0 + wide, y)), fill="#dddddd")
        drawing.text((x0 - 6, y), label, fill="black", font=font, anchor="rm")
    for step in range(0, last_step + 1, 1000):
        drawing.text((at(step, low)[0], y0 + high + 6), str(step), "black", font, anchor="ma")
    for index, (name, curve) in enumerate(curves.items()):
        color = _COLORS[index % len(_COLORS)]
        points = [at(step, min(max(value, low), top)) for step, value in curve]
        drawing.line(points, fill=color, width=2)
        for x, y in points if len(points) < 10 else ():
            drawing.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        if left == 0:  # the colours are the same in both panels
            drawing.text((x0 + wide - 8, y0 + 8 + 16 * index), name, color, font, anchor="ra")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.builtin.training_curves",
        description="Condense logs of training runs and draw their curves.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("logs", nargs="+", metavar="NAME=LOG", help="a run's name and log.jsonl")
    options = parser.parse_args(arguments)
    earlier = options.out / "curves.json"
    runs = json.loads(earlier.read_text(encoding="utf-8")) if earlier.exists() else {}
    for argument in options.logs:
        name, separator, log = argument.partition("=")
        if not separator:
            parser.error(f"{argument}: expected NAME=LOG")
        lines = Path(log).read_text(encoding="utf-8").splitlines()
        runs[name] = condense([json.loads(line) for line in lines])
    options.out.mkdir(parents=True, exist_ok=True)
    write_record(runs, options.out / "curves.json")
    plot(runs, options.out / "curves.png")


if __name__ == "__main__":
    main()
