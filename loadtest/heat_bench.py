"""One card of three slows down to a third: Ray Serve's own ways by queue, against Kelvin's.

    python -m loadtest.heat_bench --json

Two arms serve the same Poisson arrivals on a real Ray with `pico`, one after the other and over
again: `queue` is Ray Serve's autoscaling with its defaults and its power of two choices, `kelvin`
the plan and the routing by load and heat. The cards are rehearsed (`deployments.heat_rehearsal`):
forwards last a fixed time, slept, so that three of them share a laptop's cores. After a quarter of
the time the first card says that it is throttled, and its forwards take three times as long. The
governor is off in both arms, for pauses cool no scripted card. Only requests that arrive after the
slowdown count.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from loadtest import command_line
from loadtest.heat_figures import KELVIN, QUEUE, Answer, compare, figures
from loadtest.overhead import machine
from loadtest.results import STDERR, Results
from serve.client import Kelvin
from serve.commands.output import stdout_is_for_json
from serve.commands.stopping import local_kelvin, stoppable
from serve.config import Settings, load_settings
from serve.errors import KelvinError
from serve.requests import GenerateRequest

POLICIES: dict[str, dict[str, Any]] = {
    QUEUE: {"autoscaling": {"policy": "queue"}, "routing": {"policy": "power_of_two"}},
    KELVIN: {"autoscaling": {"policy": "kelvin"}, "routing": {"policy": "kelvin"}},
}
CARDS = 3
SLOWER = 3.0
# A forward of pico stays below the 10 ms that a rehearsal rounds to.
_FORWARD_S = 0.01
_COOL_FACTOR = 12.0
_COOL = {"temperature_c": 45.0, "limit_c": 86.0, "slowdown": _COOL_FACTOR}
_HOT = {
    "temperature_c": 84.0,
    "limit_c": 86.0,
    "clocks_event_reasons": 0x20,
    "slowdown": _COOL_FACTOR * SLOWER,
}
_BEFORE = 0.25  # of the time, cool
_WARM_UP_REQUESTS = 6


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Return the times of a Poisson process."""
    gaps = random.Random(f"heat {seed}")
    times, at = [], gaps.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += gaps.expovariate(rate)
    return times


def settings_of(arm: str, folder: Path, options: argparse.Namespace) -> Settings:
    """Return the settings of one arm.

    Args:
        arm: Of POLICIES.
        folder: For the store and the script of the heat.
        options: Of the command line.
    """
    denoiser = {"num_replicas": CARDS, "min_replicas": CARDS, "max_replicas": options.most}
    return load_settings(
        overrides={
            "model": {"path": "pico"},
            "denoiser": [
                {"name": "denoiser", "torch_threads": 1, "kind_speed": 1.0, "start_s": 15.0}
                | denoiser
            ],
            "http": {"port": 0},
            "embedded_store": {"data_dir": str(folder / "store")},
            "thermal": {"source": "scripted", "script": str(folder / "heat.yaml")},
            "governor": {"enabled": False},
            **POLICIES[arm],
        }
    )


def write_script(folder: Path, first: dict[str, float]) -> None:
    """Say what the cards seem to read: the first one, and all others cool."""
    part = folder / "heat.part"
    part.write_text(yaml.safe_dump({"replicas": [first], "default": _COOL}))
    os.replace(part, folder / "heat.yaml")


def run_arm(arm: str, times: Sequence[float], options: argparse.Namespace) -> dict[str, Any]:
    """Start one arm, serve the arrivals and return its figures."""
    with tempfile.TemporaryDirectory(prefix="kelvin-heat-") as name:
        folder = Path(name)
        write_script(folder, _COOL)
        with (
            local_kelvin(settings_of(arm, folder, options)) as kelvin,
            Kelvin(kelvin.url) as client,
        ):
            for _ in range(_WARM_UP_REQUESTS):
                client.generate(_request(0, options.steps))
            hot_at = _BEFORE * options.seconds
            timer = threading.Timer(hot_at, write_script, (folder, _HOT))
            timer.start()
            try:
                answers = serve(client, times, options.steps)
            finally:
                timer.cancel()
            status = client.status()
    hot = _hot_replica(status)
    return figures(arm, [answer for answer in answers if answer.at >= hot_at], hot, status)


def serve(client: Kelvin, times: Sequence[float], steps: int) -> list[Answer]:
    """Send each request when it is due, whatever became of the others."""
    began = time.monotonic()

    def send(number: int, at: float) -> Answer:
        sent = time.monotonic()
        try:
            result = client.generate(_request(number, steps))
        except KelvinError as error:
            return Answer(at, time.monotonic() - sent, None, f"{error.code}: {error.message}")
        (replica,) = {report.replica for report in result.stages if report.stage == "denoise"}
        return Answer(at, time.monotonic() - sent, replica)

    with ThreadPoolExecutor(128) as senders:
        pending = []
        for number, at in enumerate(times):
            time.sleep(max(began + at - time.monotonic(), 0.0))
            pending.append(senders.submit(send, number, at))
        return [each.result() for each in pending]


def measure(options: argparse.Namespace, results: Results) -> None:
    """Run the arms in turn, the one that begins changing."""
    alone_s = options.steps * _FORWARD_S * _COOL_FACTOR
    rate = options.load * CARDS / alone_s
    results.keep(offered={"rate": round(rate, 3), "unloaded_s": alone_s, "load": options.load})
    runs: list[dict[str, Any]] = []
    for number in range(options.rounds):
        times = arrivals(rate, options.seconds, options.seed + number)
        order = list(POLICIES) if number % 2 == 0 else list(POLICIES)[::-1]
        for arm in order:
            runs.append(run_arm(arm, times, options))
            results.keep(runs=runs)
    results.keep(**compare(runs))


def _request(number: int, steps: int) -> GenerateRequest:
    return GenerateRequest(prompt="a red circle", num_inference_steps=steps, seed=number)


def _hot_replica(status: dict[str, Any]) -> str | None:
    for replica in status["stages"]["denoise"]:
        if (replica["heat"] or {}).get("throttled"):
            return str(replica["replica"])
    return None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.heat_bench", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--out", type=command_line.file_to_write, help="file for the same JSON, as it grows")
    add("--rounds", type=command_line.whole(1, 20), default=2, help="runs of each arm")
    add("--seconds", type=command_line.number(10, 3600), default=80.0, help="of arrivals, each run")
    add("--steps", type=command_line.whole(1, 100), default=6, help="of each request")
    add(
        "--load",
        type=command_line.number(0.05, 2),
        default=0.5,
        help="share of what the three cool cards do, one request at a time",
    )
    add(
        "--most", type=command_line.whole(CARDS, 8), default=CARDS + 1, help="replicas there may be"
    )
    add("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; exit 0 whether or not the targets are met."""
    return command_line.run_in_words(_run, parse_arguments(arguments))


def _run(options: argparse.Namespace) -> int:
    known = {
        "command": command_line.command_of("loadtest.heat_bench"),
        "machine": machine(),
        "cards": CARDS,
        "slower": SLOWER,
        "most_replicas": options.most,
    }
    with Results(known, options.out, options.json) as results, stdout_is_for_json(), stoppable():
        measure(options, results)
        STDERR.print(results.report["targets"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
