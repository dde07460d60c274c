"""Kelvin and its peers on one card: pictures a second when many wait, and the time of one alone.

Arms live side by side in one process, so that their turns alternate on a card of one temperature.
Nothing else is between a call and its picture: no HTTP and no Ray, for any arm.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from loadtest.denoise_arms import forget_garbage
from loadtest.gpu_readings import GpuReadings
from loadtest.peer_arms import Arm, ArmBuilder
from loadtest.peer_kelvin import KelvinArm
from loadtest.peer_settings import Cell
from loadtest.results import STDERR, Results
from loadtest.stage_memory import GIB

_WARM_UP_STEPS = 2

AT_LEAST: dict[str, dict[str, float]] = {
    "large-1024": {"tutorial": 2.0, "compiled": 1.4},
    "medium-512": {"tutorial": 3.0},
}
"""Kelvin's pictures a second over a peer's, by cell."""


@dataclass
class Run:
    """An arm and what was measured of it so far."""

    arm: Arm
    known: dict[str, Any]
    held: int = 0  # bytes beside its weights, after warm-up
    peak: int = 0  # bytes beside its weights
    alone_s: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    readings: list[dict[str, Any]] = field(default_factory=list)
    pictures: int = 0


@dataclass(frozen=True)
class Rounds:
    """How long a cell is measured.

    Attributes:
        number: Of turns that every arm gets, the order reversed from one to the next.
        pictures: Asked for at once in each.
        alone: Asked for one after the other in each.
    """

    number: int
    pictures: int
    alone: int


def measure_cell(
    cell: Cell,
    names: Sequence[str],
    rounds: Rounds,
    device: torch.device,
    results: Results,
    sitting: int,
) -> None:
    """Build the named arms, warm them up alike, and measure them in turns.

    Each arm's figures are kept after every round, under the cell's name. An arm that cannot be
    built or fails says why and is left out of the rest.

    Args:
        cell: Model, size, steps.
        names: Of arms.
        rounds: How long.
        device: Where.
        results: Where figures are kept.
        sitting: Number of the run, by which figures say what they were measured with.
    """
    builder = ArmBuilder(cell, device)
    builder.share(list(names))
    runs: dict[str, Run] = {}
    for name in names:
        try:
            runs[name] = built(builder, name, cell, rounds, device)
        except Exception as error:  # the other arms are measured all the same
            results.keep_part(cell.name, name, {"sitting": sitting, **_failure(error)})
        forget_garbage(device)
    order = list(runs)
    number = 0
    for _ in range(rounds.number):
        for name in list(order):
            try:
                take_turn(runs[name], cell, rounds, number, device)
            except Exception as error:
                order.remove(name)
                results.keep_part(cell.name, name, {"sitting": sitting, **_failure(error)})
                continue
            results.keep_part(cell.name, name, figures(runs[name], cell, rounds, sitting))
        number += rounds.alone + rounds.pictures
        order.reverse()
    for run in runs.values():
        run.arm.close()
    runs.clear()
    del builder
    torch.compiler.reset()
    forget_garbage(device)


def built(builder: ArmBuilder, name: str, cell: Cell, rounds: Rounds, device: torch.device) -> Run:
    """Build an arm and warm it up: one picture alone and all of a round at once, in few steps."""
    began = time.monotonic()
    STDERR.print(f"{cell.name}, {name}: loading")
    arm = builder.build(name)
    forget_garbage(device)
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loaded_s = time.monotonic() - began
    known: dict[str, Any] = {"loaded_s": loaded_s}
    STDERR.print(f"{cell.name}, {name}: loaded in {loaded_s:.1f} s; compiling and warming up")
    if isinstance(arm, KelvinArm):
        known |= arm.prepare()
    arm.make([cell.ask(-1, _WARM_UP_STEPS)])
    STDERR.print(f"{cell.name}, {name}: one alone after {time.monotonic() - began:.1f} s")
    arm.make([cell.ask(-2 - each, _WARM_UP_STEPS) for each in range(rounds.pictures)])
    known["warm_up_s"] = time.monotonic() - began - loaded_s
    STDERR.print(f"{cell.name}, {name}: ready after {time.monotonic() - began:.1f} s")
    run = Run(arm, known, held=_allocated(device) - before)
    run.peak = _peak(device) - before
    return run


def take_turn(run: Run, cell: Cell, rounds: Rounds, number: int, device: torch.device) -> None:
    """Measure one turn of an arm; what it took is added to the run.

    Raises:
        RuntimeError: A picture of another size came back.
    """
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for each in range(rounds.alone):
        began = time.monotonic()
        run.arm.make([cell.ask(number + each)])
        run.alone_s.append(time.monotonic() - began)
    asked = [cell.ask(number + rounds.alone + each) for each in range(rounds.pictures)]
    with GpuReadings(device) as readings:
        began = time.monotonic()
        made = run.arm.make(asked)
        seconds = time.monotonic() - began
    if any(picture.shape != (cell.side, cell.side, 3) for picture in made):
        raise RuntimeError("a picture of another size came back")
    run.per_s.append(len(made) / seconds)
    run.pictures += len(made)
    run.readings.append(readings.summary())
    run.peak = max(run.peak, run.held + _peak(device) - before)


def figures(run: Run, cell: Cell, rounds: Rounds, sitting: int) -> dict[str, Any]:
    """Return what was measured of an arm so far."""
    joules = [each["joules"] for each in run.readings]
    on_card = run.peak > 0
    return {
        "sitting": sitting,
        "steps": cell.steps,
        "asked_at_once": rounds.pictures,
        "pictures": run.pictures,
        "batch": getattr(run.arm, "batch", None),
        "pictures_per_s": _spread(run.per_s),
        "alone_s": _spread(run.alone_s),
        "weights_gib": run.arm.weights_bytes / GIB,
        "peak_gib": (run.arm.weights_bytes + run.peak) / GIB if on_card else None,
        "joules_per_picture": None if None in joules else sum(joules) / run.pictures,
        "mean_w": [each["mean_w"] for each in run.readings],
        "temperature_c": [each["temperature_c"] for each in run.readings],
        "sm_clock_mhz": [each["sm_clock_mhz"] for each in run.readings],
        **run.known,
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    median = statistics.median(values)
    return {"median": median, "least": min(values), "most": max(values), "n": len(values)}


def _failure(error: Exception) -> dict[str, str]:
    return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def ratios_of(arms: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return Kelvin over each peer of one cell: pictures a second, and how much sooner one alone.

    The latter where pictures alone were asked for.

    Args:
        arms: Figures by arm.
    """
    ours = arms.get("kelvin", {})
    if not ours.get("pictures_per_s"):
        return {}
    ratios = {}
    for name, arm in arms.items():
        if name == "kelvin" or not arm.get("pictures_per_s"):
            continue
        per_s = ours["pictures_per_s"]["median"] / arm["pictures_per_s"]["median"]
        ratios[name] = {"pictures_per_s": per_s}
        if arm["alone_s"] and ours["alone_s"]:
            ratios[name]["alone"] = arm["alone_s"]["median"] / ours["alone_s"]["median"]
    return ratios


def targets_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what each measured cell must reach, and whether it does."""
    targets = {}
    for cell, peers in AT_LEAST.items():
        ratios = ratios_of(report.get(cell, {}))
        for peer, least in peers.items():
            if peer in ratios:
                value = ratios[peer]["pictures_per_s"]
                met = value >= least
                targets[f"{cell}, kelvin/{peer}"] = {"at_least": least, "is": value, "met": met}
    return targets
