"""Ray's tutorial form and Kelvin at one rate of requests: on a card in this process, or as servers.

On a card, (a) has one caller at a time, as its replica has one pipeline; Kelvin takes all that
come.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from deployments.builtin.dequantise import dequantized_directory
from loadtest.gpu_readings import GpuReadings
from loadtest.lateness import lateness_of
from loadtest.lateness import measure as measure_generator
from loadtest.open_loop import poisson
from loadtest.peer_arms import Arm, ArmBuilder
from loadtest.peer_callers import offer, one_after_the_other
from loadtest.peer_dtype import faster_of, product_ms
from loadtest.peer_servers import Server, server
from loadtest.peer_settings import Cell
from loadtest.peers_on_a_card import Rounds, built, figures, take_turn
from loadtest.peers_on_a_cpu import Jobs
from loadtest.process_census import processes
from loadtest.results import Results
from loadtest.stage_memory import GIB
from serve.config import ModelSettings
from serve.errors import ConfigurationError, StageFailed
from serve.model_dir import resolve_model_dir

ARMS = ("tutorial", "kelvin")
_IDLE_S = 10.0  # before each arm, so that both begin on a card that has cooled
_SEED = "claims"


def on_a_card(
    cell: Cell, options: argparse.Namespace, device: torch.device, results: Results
) -> None:
    """Measure both arms in this process; `arms` of the report has what came of each."""
    builder = ArmBuilder(cell, device)
    builder.share(list(ARMS))
    rounds = Rounds(1, options.saturated, 1)
    runs = {name: built(builder, name, cell, rounds, device) for name in ARMS}
    for name, run in runs.items():
        take_turn(run, cell, rounds, 0, device)
        found = figures(run, cell, rounds, 0)
        found["saturated_per_s"] = found["pictures_per_s"]["median"]
        found["memory_gib"] = found["peak_gib"]
        results.keep_part("arms", name, found)
    alone_s = results.report["arms"]["tutorial"]["alone_s"]["median"]
    rate = options.load / alone_s
    times = poisson(rate, 0.0, options.seconds, _SEED)
    results.keep(rate_per_s=rate)
    for name, run in runs.items():
        if device.type == "cuda":
            time.sleep(_IDLE_S)
        with GpuReadings(device) as readings:
            began = time.monotonic()
            took, late_s = _offer(run.arm, cell, times, 1 if name == "tutorial" else 64)
        looks = [(each.at - began, each.power_w, each.temperature_c) for each in readings.readings]
        # A card takes half a minute to become as warm as it gets.
        warm = [each for at, _, each in looks if at > options.seconds / 2 and each is not None]
        results.report["arms"][name] |= {
            "latencies": took,
            "readings": looks[::10],  # one a second
            "temperature_c": statistics.median(warm) if warm else None,
        }
        results.report["arms"][name]["mean_w"] = readings.summary()["mean_w"]
        generator = lateness_of(late_s)
        results.keep_part("served", name, {"generator": generator, **readings.summary()})
    for run in runs.values():
        run.arm.close()


def _offer(
    arm: Arm, cell: Cell, times: Sequence[float], callers: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """Ask for a picture at each time.

    Returns:
        When each was due and how long it took from then; and how late each was asked for. Seconds.
    """
    took: list[tuple[float, float]] = []
    late_s: list[float] = []
    lock = threading.Lock()
    began = time.monotonic()

    def ask(number: int, at: float) -> None:
        arm.make([cell.ask(1000 + number)])
        with lock:
            took.append((at, time.monotonic() - began - at))

    with ThreadPoolExecutor(callers) as pool:
        asked = []
        for number, at in enumerate(times):
            time.sleep(max(began + at - time.monotonic(), 0.0))
            late_s.append(time.monotonic() - began - at)
            asked.append(pool.submit(ask, number, at))
        for each in asked:
            each.result()
    return sorted(took), late_s


def on_a_cpu(options: argparse.Namespace, folder: Path, results: Results) -> None:
    """Measure both as servers with the built-in model; as `on_a_card`."""
    model = resolve_model_dir(ModelSettings(path="builtin"))
    plain = dequantized_directory(model, folder / "plain", faster_of(product_ms()))
    jobs = Jobs(options.steps)
    results.keep(generator_alone=measure_generator())
    with ExitStack() as running:
        servers: dict[str, Server] = {}
        for name in ARMS:
            log = folder / f"{name}.log"
            try:
                servers[name] = running.enter_context(server(name, plain, log))
            except RuntimeError as error:
                raise ConfigurationError(str(error), field="arm", value=name) from None
        warm, alone = jobs.take(2, "equal", ""), jobs.take(3, "equal", "")
        together = jobs.take(options.saturated, "equal", "")
        for name, where in servers.items():
            one_after_the_other(name, where.url, warm)
            singly = one_after_the_other(name, where.url, alone)
            came = offer(name, where.url, together, [0.0] * len(together))
            if failures := sorted({each.failure for each in (*singly, *came) if each.failure}):
                raise StageFailed(f"{name} fails: {failures[0]}", field="arm", value=name)
            took = [each.seconds for each in singly]
            per_s = len(together) / max(each.seconds for each in came)
            found = {"alone_s": took, "saturated_per_s": per_s, "mean_w": None}
            results.keep_part("arms", name, found | {"temperature_c": None, "readings": []})
        rate = options.load / statistics.median(results.report["arms"]["tutorial"]["alone_s"])
        times = poisson(rate, 0.0, options.seconds, _SEED)
        asked = jobs.take(len(times), "equal", "")
        results.keep(rate_per_s=rate)
        for name, where in servers.items():
            served = offer(name, where.url, asked, times)
            failed = sum(each.picture is None for each in served)
            results.report["arms"][name] |= {
                "latencies": [(each.at, each.seconds) for each in served if each.picture],
                # Of all that it started: Ray's own processes are part of what one has to run.
                "memory_gib": sum(
                    each.rss_bytes - each.shared_bytes for each in processes(where.pid)
                )
                / GIB,
            }
            generator = lateness_of([each.late_s for each in served])
            results.keep_part("served", name, {"generator": generator, "failed": failed})
