"""How long a picture takes end to end, and how much of that is not the model.

`python -m loadtest.overhead --json` starts everything on this machine, warms it up and sends
requests one after the other through HTTP: a progress stream, the object store, and the fetch of the
picture by its presigned URL are all inside the time, because a caller waits for them.
`--telemetry` measures what traces and metrics cost instead (`loadtest.telemetry_overhead`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from serve.client import Kelvin
from serve.commands.output import stdout_is_for_json, write_json
from serve.commands.stopping import local_kelvin, stoppable
from serve.config import load_settings
from serve.errors import KelvinError
from serve.requests import GenerateRequest, GenerateResult

LONGEST_MEDIAN_S = 4.0
LONGEST_OVERHEAD_S = 0.150
_MODELS = "builtin, pico or a folder; with --device cuda medium or large"
_DEVICES = "with --telemetry: cuda measures SD3.5 with random weights on a GPU"
_ON_A_CARD = ("medium", "large")
_MODEL_STAGES = ("text", "denoise", "decode")
_COLORS = ("red", "green", "blue", "yellow", "white", "orange", "purple")


@dataclass(frozen=True)
class Timing:
    """One request, in seconds. `total_s` is what the caller waited, fetching included."""

    total_s: float
    text_s: float
    denoise_s: float
    decode_s: float
    store_s: float
    queue_s: float  # waited inside stage replicas
    fetch_s: float  # from the result to the verified bytes
    server_s: float  # from acceptance to published, by the server's clock

    @property
    def model_s(self) -> float:
        """Work of the model's three parts."""
        return self.text_s + self.denoise_s + self.decode_s

    @property
    def overhead_s(self) -> float:
        """All that is not model time."""
        return self.total_s - self.model_s

    @property
    def hops_s(self) -> float:
        """The rest of the server's time: calls between processes, the journal, progress."""
        return self.server_s - self.model_s - self.store_s - self.queue_s

    @property
    def front_door_s(self) -> float:
        """Outside of the server's clock: connection, acceptance, the last event's way back."""
        return self.total_s - self.server_s - self.fetch_s


def timing_of(result: GenerateResult, total_s: float, fetch_s: float) -> Timing:
    """Return the parts of one request from what the stages reported."""

    def of(stage: str) -> float:
        return sum(report.seconds for report in result.stages if report.stage == stage)

    return Timing(
        total_s=total_s,
        text_s=of("text"),
        denoise_s=of("denoise"),
        decode_s=of("decode"),
        store_s=of("store"),
        queue_s=sum(report.queue_s for report in result.stages if report.stage in _MODEL_STAGES),
        fetch_s=fetch_s,
        server_s=result.seconds,
    )


def measure(client: Kelvin, number: int, warm_up: int = 2) -> list[Timing]:
    """Send requests one after the other and return the timings of all but the first ones."""
    timings = []
    for index in range(warm_up + number):
        request = GenerateRequest(prompt=_prompt(index), num_inference_steps=20, seed=index)
        begun = time.perf_counter()
        result = client.generate(request)
        finished = time.perf_counter()
        for image in result.images:
            client.download(image)
        fetched = time.perf_counter()
        if index >= warm_up:
            timings.append(timing_of(result, fetched - begun, fetched - finished))
    return timings


def _prompt(index: int) -> str:
    # Another one each time, or the text encoder's cache would hide its work.
    first = _COLORS[index % len(_COLORS)]
    second = _COLORS[(index + 1 + index // len(_COLORS)) % len(_COLORS)]
    return f"a large {first} circle left of a small {second} square"


def report_of(timings: Sequence[Timing], model: str) -> dict[str, Any]:
    """Return medians, targets, machine and every request as one JSON object."""
    parts = (
        *("total_s", "model_s", "overhead_s", "text_s", "denoise_s", "decode_s"),
        *("store_s", "queue_s", "hops_s", "front_door_s", "fetch_s"),
    )
    medians = {
        part: round(statistics.median(getattr(timing, part) for timing in timings), 4)
        for part in parts
    }
    return {
        "model": model,
        "requests": len(timings),
        "median": medians,
        "targets": {
            "total_s": {"at_most": LONGEST_MEDIAN_S, "met": medians["total_s"] <= LONGEST_MEDIAN_S},
            "overhead_s": {
                "at_most": LONGEST_OVERHEAD_S,
                "met": medians["overhead_s"] <= LONGEST_OVERHEAD_S,
            },
        },
        "machine": machine(),
        "timings": [
            {name: round(seconds, 4) for name, seconds in asdict(timing).items()}
            for timing in timings
        ],
    }


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    name = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "python": platform.python_version()}


def table_of(report: dict[str, Any]) -> Table:
    """Return the medians as a table."""
    where = f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    table = Table(title=f"{report['model']}, {report['requests']} requests, {where}")
    table.add_column("part")
    table.add_column("median s", justify="right")
    table.add_column("target")
    for part, seconds in report["median"].items():
        target = report["targets"].get(part)
        words = ""
        if target is not None:
            words = f"<= {target['at_most']} s: {'met' if target['met'] else 'MISSED'}"
        table.add_row(part.removesuffix("_s").replace("_", " "), f"{seconds:.3f}", words)
    return table


def main() -> int:
    """Measure and report; exit 0 whether or not the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m loadtest.overhead")
    parser.add_argument("--n", type=int, default=10, help="requests measured")
    parser.add_argument("--model", default="builtin", help=_MODELS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=_DEVICES)
    parser.add_argument("--telemetry", action="store_true", help="what telemetry costs instead")
    parser.add_argument("--latency-s", type=float, default=300, help="seconds, with --telemetry")
    parser.add_argument("--throughput-s", type=float, default=120, help="seconds, with --telemetry")
    parser.add_argument(
        "--control", action="store_true", help="with --telemetry: leave it off, for the error"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    if min(options.n, options.latency_s, options.throughput_s) < 1:
        parser.error("--n, --latency-s, --throughput-s: at least 1")
    if options.device == "cuda" and not (options.telemetry and options.model in _ON_A_CARD):
        parser.error(f"--device cuda: with --telemetry and --model {' or '.join(_ON_A_CARD)}")
    if options.telemetry:
        return _telemetry(options)
    try:
        with (
            stdout_is_for_json() as stdout,
            stoppable(),
            tempfile.TemporaryDirectory(prefix="kelvin-overhead-") as folder,
        ):
            settings = load_settings(
                overrides={
                    "model": {"path": options.model},
                    "http": {"port": 0},
                    "embedded_store": {"data_dir": folder},
                }
            )
            with local_kelvin(settings) as kelvin, Kelvin(kelvin.url) as client:
                report = report_of(measure(client, options.n), options.model)
            Console(stderr=True).print(table_of(report))
            if options.json:
                write_json(report, stdout)
    except KelvinError as error:
        print(json.dumps(error.body()), file=sys.stderr)
        return 1
    return 0


def _telemetry(options: argparse.Namespace) -> int:
    from loadtest.telemetry_figures import table_of
    from loadtest.telemetry_overhead import compare, compare_on_a_card

    measure_costs = compare_on_a_card if options.device == "cuda" else compare
    with stdout_is_for_json() as stdout, stoppable():
        report = measure_costs(
            options.model, options.latency_s, options.throughput_s, turn_on=not options.control
        )
        Console(stderr=True).print(table_of(report))
        if options.json:
            write_json(report, stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
