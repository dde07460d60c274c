"""Requests as they come: Poisson at a rate that may change, or from a recorded file; all seeded."""

from __future__ import annotations

import csv
import functools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.simulation.kinds import KindName, step_costs
from cluster.simulation.scenario import Burst, Diurnal, Recorded, Scenario
from cluster.work_keys import size_key
from deployments.step_costs import TokenShape
from serve.errors import ConfigurationError

LATENT_PIXELS = 8
TEXT_TOKENS = 333  # CLIP's 77 and T5's 256
COLUMNS = ("at_s", "width", "height", "num_inference_steps", "guidance_scale")


class Request:
    """One request on its way.

    Attributes:
        key: Unique; rises in the order of arrival.
        at: Seconds, when it came.
        shape: Of its rows.
        rows: Of each step: 1 without guidance, 2 with.
        steps: In all.
        steps_done: On the replica that has it; lost with the replica.
        submitted_at: Seconds, when that replica took it.
        size: Its key for the routing.
        restarts: Times it lost its replica.
        latency_s: None until it ended.
    """

    __slots__ = (
        "at",
        "key",
        "latency_s",
        "restarts",
        "rows",
        "shape",
        "size",
        "steps",
        "steps_done",
        "submitted_at",
    )

    def __init__(self, key: int, at: float, shape: TokenShape, rows: int, steps: int) -> None:
        self.key = key
        self.at = at
        self.shape = shape
        self.size = size_of(shape)
        self.rows = rows
        self.steps = steps
        self.steps_done = 0
        self.submitted_at = at
        self.restarts = 0
        self.latency_s: float | None = None


def requests_of(scenario: Scenario, seed: int) -> Iterator[Request]:
    """Yield requests in the order in which they come, up to the scenario's end.

    Raises:
        ConfigurationError: A recorded file cannot be read.
    """
    arrivals = scenario.traffic.arrivals
    if isinstance(arrivals, Recorded):
        return _recorded(arrivals.file, scenario.duration_s)
    return _drawn(scenario, seed)


def denoise_s(scenario: Scenario, name: KindName) -> float:
    """Return the mean seconds of a request alone on a cool card of a kind."""
    traffic, costs = scenario.traffic, step_costs(name, scenario.model)
    guided = sum(
        weight
        * sum(
            share * costs.seconds(square(side), rows)
            for rows, share in ((2, 1 - traffic.unguided), (1, traffic.unguided))
        )
        for side, weight in traffic.sides.items()
    ) / sum(traffic.sides.values())
    steps = sum(step * weight for step, weight in traffic.steps.items())
    return guided * steps / sum(traffic.steps.values())


def mean_rate(scenario: Scenario) -> float:
    """Return requests a second that are `load` of what all cards do cool, one at a time."""
    capacity = sum(cards.number / denoise_s(scenario, cards.kind) for cards in scenario.cards)
    return scenario.traffic.load * capacity


def square(side: int) -> TokenShape:
    """Return the shape of a square picture of so many pixels a side."""
    return TokenShape(side // LATENT_PIXELS, side // LATENT_PIXELS, TEXT_TOKENS)


@functools.cache
def size_of(shape: TokenShape) -> str:
    """Return the routing's key of a shape."""
    return size_key(shape.width * LATENT_PIXELS, shape.height * LATENT_PIXELS)


def _drawn(scenario: Scenario, seed: int) -> Iterator[Request]:
    traffic = scenario.traffic
    gaps, asks = random.Random(f"gaps {seed}"), random.Random(f"asks {seed}")
    factor, highest = _rate_factor(scenario)
    rate = mean_rate(scenario) * highest
    sides, side_weights = [square(side) for side in traffic.sides], list(traffic.sides.values())
    steps, step_weights = list(traffic.steps), list(traffic.steps.values())
    at, key = 0.0, 0
    while True:
        at += gaps.expovariate(rate)
        if at >= scenario.duration_s:
            return
        # A changing rate is a constant higher one, thinned.
        if factor is not None and gaps.random() * highest >= factor(at):
            continue
        (shape,) = asks.choices(sides, side_weights)
        (number,) = asks.choices(steps, step_weights)
        rows = 1 if asks.random() < traffic.unguided else 2
        yield Request(key, at, shape, rows, number)
        key += 1


def _rate_factor(scenario: Scenario) -> tuple[Callable[[float], float] | None, float]:
    """Return the rate over time as a multiple of the load's, and its highest value."""
    arrivals = scenario.traffic.arrivals
    if isinstance(arrivals, Burst):
        burst = arrivals

        def in_bursts(at: float) -> float:
            inside = any(start <= at < start + burst.lasts_s for start in burst.starts_s)
            return burst.factor if inside else 1.0

        return in_bursts, max(burst.factor, 1.0)
    if isinstance(arrivals, Diurnal):
        swing, turn = arrivals.swing, 2 * math.pi / arrivals.period_s
        return lambda at: 1 - swing * math.cos(at * turn), 1 + swing
    return None, 1.0


def _recorded(file: Path, duration_s: float) -> Iterator[Request]:
    """Read a CSV with the columns of `COLUMNS`; times are seconds from the beginning and rise."""
    requests, before = [], 0.0
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for key, row in enumerate(csv.DictReader(stream)):
                at, width, height = float(row["at_s"]), int(row["width"]), int(row["height"])
                steps = int(row["num_inference_steps"])
                if not (at >= before and math.isfinite(at)):
                    raise ValueError(f"line {key + 2}: times must rise")
                if not (1 <= steps <= 200 and 64 <= min(width, height) <= max(width, height)):
                    raise ValueError(f"line {key + 2}: no such picture")
                rows = 1 if float(row["guidance_scale"]) == 1.0 else 2
                before = at
                if at < duration_s:
                    sides = height // LATENT_PIXELS, width // LATENT_PIXELS
                    shape = TokenShape(*sides, TEXT_TOKENS)
                    requests.append(Request(key, at, shape, rows, steps))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"Recorded traffic cannot be read: {error!r}",
            field="traffic.arrivals.file",
            value=str(file),
            allowed=f"a CSV with the columns {', '.join(COLUMNS)}",
        ) from error
    return iter(requests)
