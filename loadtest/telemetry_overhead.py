"""What telemetry costs: two services beside each other, one with traces and metrics by OTLP.

Requests go to the one and the other in turn, so that whatever else the machine does meets both
alike, and the differences of pairs are looked at. It takes pico: a picture of it is a tenth of a
second, of which a difference of 3 ms is 3 %; of the built-in model's two seconds it would be
0.15 %, and would need thousands of pairs. For throughput pico is the worst case, because its
denoiser is not what is short: all that Kelvin does beside the model is.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.overhead import machine
from loadtest.process_census import cpu_seconds
from loadtest.telemetry_arm import Collector, collector
from serve.client import Kelvin
from serve.requests import GenerateRequest

MOST_THROUGHPUT_LOST = 0.01
MOST_LATENCY_S = 0.003
_PROMPT = "a red circle"
_STEPS = 28
_WARM_UP = 8
_CLIENTS = 4
_RESAMPLED = 4000


@dataclass
class Arm:
    """One of the two services."""

    name: str
    url: str
    pid: int

    def requests(self, seeds: Iterable[int]) -> Iterator[float]:
        """Make pictures one after the other, over one connection; yield the seconds of each."""
        with Kelvin(self.url) as client:
            for seed in seeds:
                request = GenerateRequest(prompt=_PROMPT, num_inference_steps=_STEPS, seed=seed)
                began = time.perf_counter()
                client.generate(request)
                yield time.perf_counter() - began


def compare(pairs: int, blocks: int, block_s: float, model: str = "pico") -> dict[str, Any]:
    """Start both, measure, stop; return the report.

    Args:
        pairs: Of single requests, for latency.
        blocks: Of a few clients at once to each arm, for throughput.
        block_s: Seconds of one.
        model: `pico`, `builtin` or a folder.
    """
    with ExitStack() as running:
        sink = running.enter_context(collector())
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="kelvin-cost-")))
        arms = [
            running.enter_context(_arm("off", model, folder / "off", None)),
            running.enter_context(_arm("on", model, folder / "on", sink)),
        ]
        for arm in arms:
            list(arm.requests(range(_WARM_UP)))
        latencies = _latencies(arms, pairs)
        throughputs, cpu = _throughputs(arms, blocks, block_s)
        return {
            "model": model,
            "num_inference_steps": _STEPS,
            "latency": latency_report(latencies["off"], latencies["on"]),
            "throughput": throughput_report(throughputs["off"], throughputs["on"]),
            "cpu_seconds_a_picture": {
                name: round(sum(each.values()), 4) for name, each in cpu.items()
            },
            "cpu_ms_a_picture_by_process": _by_process(cpu),
            "otlp": {"messages": sink.messages, "bytes": sink.bytes},
            "machine": machine(),
        }


def latency_report(off: Sequence[float], on: Sequence[float]) -> dict[str, Any]:
    """Return the cost in seconds, with its 95 % interval.

    Args:
        off: Seconds of the requests without, in the order of `on`.
        on: Of their pairs.
    """
    low, high = interval([with_it - without for without, with_it in zip(off, on, strict=True)])
    cost = statistics.median(with_it - without for without, with_it in zip(off, on, strict=True))
    return {
        "pairs": len(off),
        "off_median_s": round(statistics.median(off), 4),
        "on_median_s": round(statistics.median(on), 4),
        "cost_s": round(cost, 5),
        "cost_95_s": [round(low, 5), round(high, 5)],
        "target": {"at_most_s": MOST_LATENCY_S, "met": _is_met(low, high, MOST_LATENCY_S)},
    }


def throughput_report(off: Sequence[float], on: Sequence[float]) -> dict[str, Any]:
    """Return the share of the throughput that is lost, with its 95 % interval.

    Args:
        off: Pictures a second of the blocks without, in the order of `on`.
        on: Of their pairs.
    """
    lost = [1 - with_it / without for without, with_it in zip(off, on, strict=True)]
    low, high = interval(lost)
    cost = statistics.median(lost)
    return {
        "blocks": len(off),
        "clients": _CLIENTS,
        "off_median_per_s": round(statistics.median(off), 3),
        "on_median_per_s": round(statistics.median(on), 3),
        "lost_share": round(cost, 4),
        "lost_share_95": [round(low, 4), round(high, 4)],
        "target": {
            "at_most": MOST_THROUGHPUT_LOST,
            "met": _is_met(low, high, MOST_THROUGHPUT_LOST),
        },
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, by the bootstrap (Efron 1979)."""
    found = np.asarray(values)
    picked = np.random.default_rng(0).integers(0, len(found), (_RESAMPLED, len(found)))
    low, high = np.quantile(np.median(found[picked], axis=1), [0.025, 0.975])
    return float(low), float(high)


def _is_met(low: float, high: float, at_most: float) -> bool | None:
    """Return whether an interval is on one side of a target; None: that is not decided."""
    return True if high <= at_most else False if low > at_most else None


def _latencies(arms: Sequence[Arm], pairs: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {arm.name: [] for arm in arms}
    each = {arm.name: arm.requests(range(pairs)) for arm in arms}
    for number in range(pairs):
        for arm in _in_turn(arms, number):
            taken[arm.name].append(next(each[arm.name]))
    return taken


def _throughputs(
    arms: Sequence[Arm], blocks: int, block_s: float
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Return pictures a second of each block, and CPU seconds a picture over all, by process."""
    rates: dict[str, list[float]] = {arm.name: [] for arm in arms}
    spent: dict[str, dict[str, float]] = {arm.name: defaultdict(float) for arm in arms}
    made = dict.fromkeys(rates, 0)
    for number in range(blocks):
        for arm in _in_turn(arms, number):
            before, began = cpu_seconds(arm.pid), time.perf_counter()
            with ThreadPoolExecutor(_CLIENTS) as clients:
                done = sum(clients.map(_as_many_as_can_be(arm, began + block_s), range(_CLIENTS)))
            rates[arm.name].append(done / (time.perf_counter() - began))
            for process, seconds in cpu_seconds(arm.pid).items():
                spent[arm.name][process] += seconds - before.get(process, 0.0)
            made[arm.name] += done
    return rates, {
        name: {process: seconds / made[name] for process, seconds in each.items()}
        for name, each in spent.items()
    }


def _by_process(cpu: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return milliseconds of each arm, most first: the model's own hide what others' show."""
    names = sorted({name for each in cpu.values() for name in each})
    found = {
        name: {arm: round(1000 * each.get(name, 0.0), 2) for arm, each in cpu.items()}
        for name in names
    }
    return dict(sorted(found.items(), key=lambda item: -max(item[1].values())))


def _as_many_as_can_be(arm: Arm, until: float) -> Callable[[int], int]:
    def client(number: int) -> int:
        done = 0
        for _ in arm.requests(itertools.count(1000 * number)):
            done += 1
            if time.perf_counter() >= until:
                break
        return done

    return client


def _in_turn(arms: Sequence[Arm], number: int) -> Sequence[Arm]:
    return arms if number % 2 == 0 else arms[::-1]


@contextmanager
def _arm(name: str, model: str, folder: Path, sink: Collector | None) -> Iterator[Arm]:
    command = [sys.executable, "-m", "loadtest.telemetry_arm", "--model", model]
    command += ["--data-dir", str(folder)]
    command += [] if sink is None else ["--otlp-endpoint", sink.endpoint]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a pipe that was asked for is not there")
        try:
            first = process.stdout.readline()
            if not first:
                raise RuntimeError(f"the service with telemetry {name} does not start")
            yield Arm(name, str(json.loads(first)["url"]), process.pid)
        finally:
            process.stdin.close()
            process.wait(60)
