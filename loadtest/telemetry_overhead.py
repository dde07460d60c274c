"""What traces and metrics by OTLP cost: the same service, with telemetry off and on in turn.

    python -m loadtest.overhead --telemetry --json
    python -m loadtest.overhead --telemetry --device cuda --model medium --json

Two instances of one service differ by more than what is looked for: their picture takes some
percent more or less, from start to finish. So there is one, in which telemetry is turned off and on
while it runs (`loadtest.telemetry_switch`), in the order off, on, on, off: neighbours in time are
compared, and what the machine does otherwise meets both alike.

Measured is latency with one caller, turned at every picture, and throughput with as many callers as
fill the machine, turned at every dozen of pictures, and on a card at every 64.

On a card both are of SD3.5 at its real size with random weights, 512 x 512 and 28 steps. Without
one they are of `pico`, because what is added is milliseconds whatever the model is, and only in a
picture of a tenth of a second can they be seen. Of larger pictures the same milliseconds are a
smaller share. How small is told beside it, of the model of `--model`: the processor time added to a
picture of pico's, over that of one of its own. Of the built-in model itself nothing closer can be
measured in minutes: neighbouring pictures differ by a tenth on a host that others use, and a
hundredth is looked for.

Beside both there is the processor time of all the service's processes, which queues and a busy host
disturb less: where processors are what is short, throughput is lost by that.

`--control` never turns it on: what is then found is the method's own error.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.overhead import machine
from loadtest.process_census import cpu_seconds
from loadtest.telemetry_collector import Collector
from loadtest.telemetry_figures import (
    Measured,
    latency_report,
    of_model_report,
    throughput_report,
)
from loadtest.telemetry_service import Service, Subject, serving
from serve.client import Kelvin

_WARM_UP = 32
_OF_MODEL = 6  # pictures, for their processor time
# What a service does for a picture after its caller has it, so that it falls on nobody else.
_SETTLE_S = 0.01
PICO = Subject("pico", 8)


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
    about = _about(turn_on=turn_on)
    found = costs(PICO, latency_s, throughput_s, turn_on=turn_on)
    beside = PICO if model == PICO.model else Subject(model, 20)
    share = of_model_report(cpu_of(beside), found["throughput"]["cpu_s"])
    of_model = {"model": model, "num_inference_steps": beside.steps, "pictures": _OF_MODEL}
    return about | found | {"of_model": of_model | share, "took_s": _since(began)}


def compare_on_a_card(
    model: str, latency_s: float, throughput_s: float, *, turn_on: bool = True
) -> dict[str, Any]:
    """Measure latency and throughput of SD3.5 on a card.

    Args:
        model: As `loadtest.sd35.config` takes it.
        latency_s: As of `compare`.
        throughput_s: As of `compare`.
        turn_on: As of `compare`.
    """
    import torch

    from loadtest.random_model import write_random_model

    began = time.monotonic()
    about = _about(turn_on=turn_on) | {"card": torch.cuda.get_device_name()}
    # It stays, for the next run, and `loadtest.scaling` has the same.
    folder = Path(tempfile.gettempdir()) / f"kelvin-random-{model}-whole"
    write_random_model(folder, model, torch.device("cuda"))
    torch.cuda.empty_cache()
    subject = Subject(str(folder), 28, 512, on_card=True, callers=8, pictures=64)
    found = costs(subject, latency_s, throughput_s, turn_on=turn_on)
    return about | found | {"model": model, "took_s": _since(began)}


def _about(*, turn_on: bool) -> dict[str, Any]:
    return {
        "control": not turn_on,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine() | {"load_before": os.getloadavg()[0]},
    }


def _since(began: float) -> int:
    return round(time.monotonic() - began)


def costs(
    subject: Subject, latency_s: float, throughput_s: float, *, turn_on: bool
) -> dict[str, Any]:
    """Start a service and measure both costs in it.

    Args:
        subject: Its pictures.
        latency_s: As of `compare`.
        throughput_s: As of `compare`.
        turn_on: As of `compare`.
    """
    with serving(subject) as (service, sink), Kelvin(service.url) as client:
        for seed in range(_WARM_UP):
            service.picture(client, seed)
        latency = measure(
            service, lambda number: service.picture(client, number), latency_s, turn_on=turn_on
        )
        service.switch.turn(on=True)
        with _callers(service, client, subject.pictures) as work:
            work(0)
            throughput = measure(service, work, throughput_s, turn_on=turn_on)
        traced = _WARM_UP + subject.pictures
        if turn_on:
            traced += len(latency.seconds) + subject.pictures * len(throughput.seconds)
        otlp = _traced(service, client, sink, traced)
    return {
        "model": subject.model,
        "num_inference_steps": subject.steps,
        "side": subject.side,
        "latency": latency_report(latency),
        "throughput": throughput_report(throughput, subject.pictures, subject.callers),
        "otlp": otlp,
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


def cpu_of(subject: Subject) -> float:
    """Start a model; return the processor seconds of a picture, of all processes."""
    with (
        serving(subject) as (service, _),
        Kelvin(service.url) as client,
        _callers(service, client, _OF_MODEL) as work,
    ):
        service.switch.turn(on=False)
        for seed in range(subject.callers):
            service.picture(client, seed)
        before = sum(cpu_seconds(service.pid).values())
        work(1)
        return (sum(cpu_seconds(service.pid).values()) - before) / _OF_MODEL


@contextmanager
def _callers(service: Service, client: Kelvin, pictures: int) -> Iterator[Callable[[int], object]]:
    """Give what makes so many pictures, by all callers together, of seeds that follow a number."""
    with ThreadPoolExecutor(service.subject.callers) as callers:

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
