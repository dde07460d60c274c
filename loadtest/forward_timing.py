"""How long one forward takes, by the device's own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from loadtest.gpu_readings import GpuReadings

Step = Callable[[], object]

_QUEUED = 8  # steps between two waits, so that the card never waits for the host


def time_steps(step: Step, number: int, device: torch.device) -> list[float]:
    """Run a step some times back to back.

    Args:
        step: Launches one forward on the device's current stream.
        number: Of steps.
        device: CUDA is timed by events, anything else by the host's clock.

    Returns:
        Milliseconds of each.
    """
    if device.type != "cuda":
        took = []
        for _ in range(number):
            began = time.perf_counter()
            step()
            took.append(1000 * (time.perf_counter() - began))
        return took
    pairs = []
    for _ in range(number):
        begin, end = _event(), _event()
        begin.record()
        step()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def alternate(
    steps: Mapping[str, Step], number: int, warm_up: int, device: torch.device
) -> dict[str, list[float]]:
    """Time several arms in turns, the order reversed from turn to turn.

    So that what drifts (heat, clocks) meets all arms alike.

    Args:
        steps: By name.
        number: Of timed steps an arm.
        warm_up: Steps before the first turn of each arm.
        device: Where they run.

    Returns:
        Milliseconds of each arm's steps.
    """
    for step in steps.values():
        time_steps(step, warm_up, device)
    took: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    turn = max(1, min(10, number // 2))
    while (left := number - len(took[order[0]])) > 0:
        for name in order:
            time_steps(steps[name], 1, device)  # the arm before left its own cache and clock
            took[name] += time_steps(steps[name], min(turn, left), device)
        order.reverse()
    return took


def sustain(step: Step, seconds: float, device: torch.device) -> dict[str, Any]:
    """Run a step without pause for a while and watch the card.

    Args:
        step: As of `time_steps`.
        seconds: How long.
        device: Where it runs.

    Returns:
        `median_ms` of a step, `steps`, `joules_per_step` and the readings of the card.
    """
    took: list[float] = []
    with GpuReadings(device) as readings:
        began = time.monotonic()
        while not took or time.monotonic() - began < seconds:
            took += time_steps(step, _QUEUED, device)
    joules = readings.joules
    return {
        "median_ms": statistics.median(took),
        "wall_ms": 1000 * readings.summary()["seconds"] / len(took),
        "steps": len(took),
        "joules_per_step": None if joules is None else joules / len(took),
        **readings.summary(),
    }
