"""What each front door costs over the Python handle: the same picture by every way, in turns.

    python -m loadtest.doors --json

Starts Kelvin with `pico` on this machine. In every round each door and the handle make one picture
of the same seed, one after the other and in an order that is drawn anew, so that whatever slows the
machine down for a while slows all of them. A door's cost is the median, over the rounds, of what it
took longer than the handle in that round; the interval holds it with 95 % (by ranks, Conover 1999,
3.2). Every way must come to the same pixels, or they were not compared at all.

What an exchange costs that does nothing is measured beside it: the native door's picture takes two,
ComfyUI's two and a websocket's messages, the others' one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from websockets.sync.client import connect

from loadtest import command_line, door_clients
from loadtest.door_clients import Asked, Caller, Connection, DoorFailed
from loadtest.overhead import machine
from loadtest.results import STDERR, Results
from serve.commands.output import stdout_is_for_json
from serve.commands.stopping import local_kelvin, stoppable
from serve.config import Settings, load_settings

HANDLE = "handle"
LARGEST_ADDED_MS = 15.0
_WARM_UP_ROUNDS = 5
_Z_95 = 1.96


def measure(
    callers: Mapping[str, Caller], rounds: int, warm_up: int = _WARM_UP_ROUNDS
) -> dict[str, list[float]]:
    """Let all callers make the same pictures, in turns; return the seconds that each took.

    Raises:
        DoorFailed: A picture is not the handle's.
    """
    taken: dict[str, list[float]] = {name: [] for name in callers}
    draw = random.Random("doors")
    for seed in range(warm_up + rounds):
        pixels: dict[str, str] = {}
        for name in draw.sample(list(callers), len(callers)):
            begun = time.perf_counter()
            file = callers[name](seed)
            seconds = time.perf_counter() - begun
            pixels[name] = _pixels(file)
            if seed >= warm_up:
                taken[name].append(seconds)
        if other := sorted(name for name in pixels if pixels[name] != pixels[HANDLE]):
            raise DoorFailed("Not the same picture.", field=other[0], value=seed)
    return taken


def empty_exchanges(connection: Connection, rounds: int) -> list[float]:
    """Return the seconds of GETs that ask the service for what it need not look up."""
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        connection.ask("GET", "/features")
        taken.append(time.perf_counter() - begun)
    return taken


def report_of(
    taken: Mapping[str, Sequence[float]], empty: Sequence[float] | None = None
) -> dict[str, Any]:
    """Return medians, what each door adds to the handle, and whether that is within the aim.

    Args:
        taken: Name -> seconds, round by round; `HANDLE` among them.
        empty: Seconds of exchanges that do nothing; None: not measured.
    """
    alone = statistics.median(taken[HANDLE])
    doors = {}
    for name in taken.keys() - {HANDLE}:
        added = sorted(
            1e3 * (door - own) for door, own in zip(taken[name], taken[HANDLE], strict=True)
        )
        low, high = _interval(added)
        doors[name] = {
            **_spread(taken[name]),
            "added_ms": round(statistics.median(added), 2),
            "interval_95_ms": [round(low, 2), round(high, 2)],
            "ratio": round(statistics.median(taken[name]) / alone, 3),
            "met": statistics.median(added) <= LARGEST_ADDED_MS,
        }
    return {
        "rounds": len(taken[HANDLE]),
        "handle": _spread(taken[HANDLE]),
        "doors": {name: doors[name] for name in taken if name in doors},
        **({} if empty is None else {"empty_exchange": _spread(empty)}),
        "target": {"added_ms_at_most": LARGEST_ADDED_MS},
        "ok": all(door["met"] for door in doors.values()),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = (1e3 * each for each in statistics.quantiles(seconds, n=4))
    return {
        "median_ms": round(middle, 2),
        "lower_quartile_ms": round(low, 2),
        "upper_quartile_ms": round(high, 2),
    }


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the order statistics of sorted values between which their median lies, with 95 %."""
    half = _Z_95 * math.sqrt(len(values)) / 2
    low = max(0, math.floor(len(values) / 2 - half) - 1)
    return values[low], values[len(values) - 1 - low]


def _pixels(file: bytes) -> str:
    with Image.open(io.BytesIO(file)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def settings_of(model: str, folder: Path) -> Settings:
    """Return the settings of a Kelvin on this machine."""
    return load_settings(
        overrides={
            "model": {"path": model},
            "http": {"port": 0},
            "embedded_store": {"data_dir": str(folder / "store")},
        }
    )


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="kelvin-doors-") as folder,
        local_kelvin(settings_of(options.model, Path(folder))) as kelvin,
        ExitStack() as opened,
    ):
        from ray import serve

        from serve.app import APP_NAME

        def connection() -> Connection:
            return opened.enter_context(Connection(kelvin.url))

        model = door_clients.own_model(connection())
        asked = Asked(model, "a large red circle", options.side, options.steps, guidance_scale=4.0)

        messages = opened.enter_context(
            connect(door_clients.comfyui_messages_url(kelvin.url), max_size=None)
        )
        callers = {
            HANDLE: door_clients.handle(serve.get_app_handle(APP_NAME), asked),
            "native": door_clients.native(connection(), asked),
            "openai": door_clients.openai(connection(), asked),
            "comfyui": door_clients.comfyui(connection(), messages, asked),
            "a1111": door_clients.a1111(connection(), asked),
        }
        taken = measure(callers, options.rounds)
        return report_of(taken, empty_exchanges(connection(), options.rounds))


def table_of(report: Mapping[str, Any]) -> Table:
    """Return the figures as a table."""
    table = Table(title=f"doors over the handle, {report['rounds']} rounds, milliseconds")
    for column in ("way", "median", "quartiles", "added", "95 %", "ratio", "target"):
        table.add_column(column)

    def quartiles(way: Mapping[str, float]) -> str:
        return f"{way['lower_quartile_ms']:.1f} to {way['upper_quartile_ms']:.1f}"

    own = report["handle"]
    table.add_row(HANDLE, f"{own['median_ms']:.1f}", quartiles(own))
    for name, door in report["doors"].items():
        low, high = door["interval_95_ms"]
        target = f"<= {LARGEST_ADDED_MS:g}: {'met' if door['met'] else 'MISSED'}"
        table.add_row(
            *(name, f"{door['median_ms']:.1f}", quartiles(door), f"{door['added_ms']:.1f}"),
            *(f"{low:.1f} to {high:.1f}", f"{door['ratio']:.2f}", target),
        )
    return table


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.doors", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--rounds", type=command_line.whole(10, 10_000), default=100, help="measured")
    add("--model", default="pico", choices=("pico", "builtin"))
    add("--side", type=command_line.side, default=64, help="of the picture, pixels")
    add("--steps", type=command_line.whole(1, 200), default=4)
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--out", type=command_line.file_to_write, help="file for the same JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; exit 1 if a door adds more than it may."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    known = {
        "command": command_line.command_of("loadtest.doors"),
        "machine": machine() | {"load_before": os.getloadavg()[0]},
        "model": options.model,
        "side": options.side,
        "steps": options.steps,
    }
    with Results(known, options.out, options.json) as results, stdout_is_for_json(), stoppable():
        results.keep(**_measured(options))
        STDERR.print(table_of(results.report))
    return 0 if results.report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
