"""Requests as the engine benchmark offers them: mixes of work and Poisson arrivals, all seeded."""

from __future__ import annotations

import random
from dataclasses import dataclass

from deployments.step_costs import StepCosts, TokenShape

TEXT_TOKENS = 333  # CLIP's 77 and T5's 256


@dataclass(frozen=True)
class Arrival:
    """One request: when it comes and what it is."""

    key: int
    at: float  # seconds
    shape: TokenShape
    rows: int  # of each step: 1 without guidance, 2 with
    steps: int

    def unloaded_s(self, costs: StepCosts) -> float:
        """What it takes on an idle card."""
        return self.steps * costs.seconds(self.shape, self.rows)


@dataclass(frozen=True)
class Mix:
    """What requests ask for; each property is drawn evenly and independently."""

    name: str
    sides: tuple[int, ...]  # pixels of a square picture
    steps: tuple[int, ...]
    guidance_scales: tuple[float, ...]  # 1 needs no unconditional row


# Popular step counts rather than any number, which gives batches of equal steps a chance.
MIXES = (
    Mix("1024", (1024,), (28,), (4.5,)),
    Mix("512", (512,), (28,), (4.5,)),
    Mix("mixed", (512, 768, 1024), (8, 12, 20, 28, 40, 50), (1.0, 3.5, 4.5, 7.0)),
)


def square(side: int, text_tokens: int = TEXT_TOKENS) -> TokenShape:
    """Return the shape of a square picture of so many pixels a side."""
    return TokenShape(side // 8, side // 8, text_tokens)


def draw(mix: Mix, number: int, rate: float | None, seed: int) -> list[Arrival]:
    """Return requests in the order in which they come.

    Args:
        mix: What they ask for.
        number: How many.
        rate: Mean requests a second of the Poisson process; None: all are there at time 0.
        seed: The same arguments give the same requests; what they ask for does not depend on rate.
    """
    asks, gaps = random.Random(f"asks {seed}"), random.Random(f"gaps {seed}")
    at = 0.0
    arrivals = []
    for key in range(number):
        side, steps = asks.choice(mix.sides), asks.choice(mix.steps)
        rows = 1 if asks.choice(mix.guidance_scales) == 1.0 else 2
        if rate is not None:
            at += gaps.expovariate(rate)
        arrivals.append(Arrival(key, at, square(side), rows, steps))
    return arrivals
