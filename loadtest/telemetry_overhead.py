"""What traces and metrics by OTLP cost: the same service, with telemetry off and on in turn.

    python -m loadtest.overhead --telemetry --json

Two instances of one service differ by more than what is looked for: their picture takes some
percent more or less, from start to finish. So there is one, in which telemetry is turned off and on
while it runs (`loadtest.telemetry_switch`), in the order off, on, on, off: neighbours in time are
compared, and what the machine does otherwise meets both alike.

Both are measured of `pico` (random weights), because what is added is milliseconds whatever the
model is, and only in a picture of a tenth of a second can they be seen:

- latency with one caller, turned at every picture;
- throughput with as many callers as fill two processors, turned at every dozen of pictures. Of
  larger pictures the same milliseconds are a smaller share. How small is told beside it, of the
  model of `--model`: the processor time added to a picture of pico's, over that of one of its own.
  Of the built-in model itself nothing closer can be measured in minutes: neighbouring pictures
  differ by a tenth on a host that others use, and a hundredth is looked for.

Beside both there is the processor time of all the service's processes, which queues and a busy host
disturb less: where processors are what is short, throughput is lost by that.

`--control` never turns it on: what is then found is the method's own error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.overhead import machine
from loadtest.process_census import cpu_seconds
from loadtest.telemetry_collector import Collector, collector
from loadtest.telemetry_figures import (
    Measured,
    latency_report,
    of_model_report,
    throughput_report,
)
from loadtest.telemetry_switch import Switch, new_switch
from serve.client import Kelvin
from serve.requests import GenerateRequest

# The more of a picture is its model, the less can be seen of what is not; a step costs telemetry
# three notes, which are counted elsewhere.
STEPS = {"pico": 8, "builtin": 20}
_PROMPT = "a red circle"
_WARM_UP = 8
_CALLERS = 4
_PICTURES = 12  # between two turns of the switch, under load
_OF_MODEL = 6  # pictures, for their processor time
# What a service does for a picture after its caller has it, so that it falls on nobody else.
_SETTLE_S = 0.01


@dataclass(frozen=True)
class Service:
    """The service that is measured.

    Attributes:
        url: Of its front doors.
        pid: Of its process; Ray's and the store's are beneath it.
        switch: Of its telemetry.
        steps: Of every picture.
    """

    url: str
    pid: int
    switch: Switch
    steps: int

    def picture(self, client: Kelvin, seed: int) -> None:
        """Make one."""
        request = GenerateRequest(prompt=_PROMPT, num_inference_steps=self.steps, seed=seed)
        client.generate(request)


def compare(
    model: str, latency_s: float, throughput_s: float, *, turn_on: bool = True
) -> dict[str, Any]:
    """Measure latency and throughput of pico, and what a picture of a model takes.

    Args:
        model: That one: `builtin`, `pico` or a folder.
        latency_s: For measuring latency; starts and what is beside come on top.
        throughput_s: The same of throughput.
        turn_on: False: a control, with telemetry off on both sides.
    """
    began = time.monotonic()
    load = os.getloadavg()[0]
    with _service("pico") as (service, sink), Kelvin(service.url) as client:
        for seed in range(_WARM_UP):
            service.picture(client, seed)
        latency = measure(
            service, lambda number: service.picture(client, number), latency_s, turn_on=turn_on
        )
        service.switch.turn(on=True)
        with _callers(service, client, _PICTURES) as work:
            work(0)
            throughput = measure(service, work, throughput_s, turn_on=turn_on)
        traced = _WARM_UP + _PICTURES
        if turn_on:
            traced += len(latency.seconds) + _PICTURES * len(throughput.seconds)
        otlp = _traced(service, client, sink, traced)
    added = throughput_report(throughput, _PICTURES, _CALLERS)
    return {
        "control": not turn_on,
        "date": time.strftime("%Y-%m-%d"),
        "model": "pico",
        "num_inference_steps": STEPS["pico"],
        "latency": latency_report(latency),
        "throughput": added,
        "of_model": {
            "model": model,
            "num_inference_steps": _steps(model),
            "pictures": _OF_MODEL,
            **of_model_report(cpu_of(model), added["cpu_s"]),
        },
        "otlp": otlp,
        "machine": machine() | {"load_before": load},
        "took_s": round(time.monotonic() - began),
    }


def measure(
    service: Service, work: Callable[[int], object], budget_s: float, *, turn_on: bool
) -> Measured:
    """Do the same work without and with telemetry, in turn, until the time is up.

    Args:
        service: That does it.
        work: Is given a number that no other call had.
        budget_s: A pair that was begun in time is finished.
        turn_on: False: telemetry stays off all the time, to see what the method finds then.
    """
    measured = Measured()
    until = time.monotonic() + budget_s
    number = 0
    while time.monotonic() < until:
        seconds, cpu = [0.0, 0.0], [0.0, 0.0]
        for arm in (0, 1) if len(measured.seconds) % 2 == 0 else (1, 0):
            service.switch.turn(on=turn_on and arm == 1)
            before, began = cpu_seconds(service.pid), time.perf_counter()
            work(number)
            seconds[arm] = time.perf_counter() - began
            time.sleep(_SETTLE_S)
            for process, spent in cpu_seconds(service.pid).items():
                added = spent - before.get(process, 0.0)
                cpu[arm] += added
                measured.by_process[arm][process] += added
            number += 1
        measured.seconds.append((seconds[0], seconds[1]))
        measured.cpu.append((cpu[0], cpu[1]))
    return measured


def cpu_of(model: str) -> float:
    """Start a model; return the processor seconds of a picture, of all processes."""
    with (
        _service(model) as (service, _),
        Kelvin(service.url) as client,
        _callers(service, client, _OF_MODEL) as work,
    ):
        service.switch.turn(on=False)
        for seed in range(_CALLERS):
            service.picture(client, seed)
        before = sum(cpu_seconds(service.pid).values())
        work(1)
        return (sum(cpu_seconds(service.pid).values()) - before) / _OF_MODEL


@contextmanager
def _callers(service: Service, client: Kelvin, pictures: int) -> Iterator[Callable[[int], object]]:
    """Give what makes so many pictures, by all callers together, of seeds that follow a number."""
    with ThreadPoolExecutor(_CALLERS) as callers:

        def work(number: int) -> None:
            seeds = range(number * pictures, (number + 1) * pictures)
            list(callers.map(lambda seed: service.picture(client, seed), seeds))

        yield work


def _traced(service: Service, client: Kelvin, sink: Collector, pictures: int) -> dict[str, int]:
    """Return what the collector got, once the traces of all that should be traced are there.

    Args:
        service: That was measured.
        client: Of it.
        sink: Where it sends.
        pictures: Made so far while telemetry was on.
    """
    service.switch.turn(on=True)
    # What was held back goes with what is new.
    service.picture(client, seed=0)
    return sink.wait_for(pictures + 1)


@contextmanager
def _service(model: str) -> Iterator[tuple[Service, Collector]]:
    with (
        collector() as sink,
        tempfile.TemporaryDirectory(prefix="kelvin-cost-") as folder,
    ):
        file = Path(folder) / "switch"
        switch = new_switch(file)
        command = [sys.executable, "-m", "loadtest.telemetry_arm", "--model", model]
        command += ["--data-dir", f"{folder}/store", "--switch", str(file)]
        command += ["--otlp-endpoint", sink.endpoint]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            if process.stdin is None or process.stdout is None:
                raise RuntimeError("a pipe that was asked for is not there")
            try:
                first = process.stdout.readline()
                if not first:
                    raise RuntimeError(f"the service of {model} does not start")
                url = str(json.loads(first)["url"])
                yield Service(url, process.pid, switch, _steps(model)), sink
            finally:
                process.stdin.close()
                process.wait(60)


def _steps(model: str) -> int:
    return STEPS.get(model, STEPS["builtin"])
