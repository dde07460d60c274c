"""How many cards of which kind a rate of pictures needs, by stage: work over speed, with headroom.

Two kinds of headroom. For queueing, that of the autoscaler: cards are filled to its target
utilisation, or by square-root staffing (Halfin and Whitt, Operations Research 29, 1981) where few
cards need relatively more spare. For heat, a share of every card's cool speed is not counted on.
No gain from several pictures in one forward is counted on either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from cluster.card_kinds import KINDS
from cluster.measured_speeds import (
    Cost,
    decode_cost,
    measured_card,
    power_of,
    step_cost,
    text_cost,
)
from cluster.plan_settings import PlanSettings

# Of data sheets, but for the A10G, which has none: what nvidia-smi shows on EC2's g5.
LIMITS_W = {"H100": 700.0, "L4": 72.0, "A10G": 300.0}
"""Watts that a card of each kind that can be planned with may draw."""

# Work that is a whole number of cards stays one however its floating-point product is rounded.
_EXACT = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the cluster.

    Attributes:
        rate: Pictures a second, on average.
        model: A key of `cluster.measured_speeds.STEPS_OF`.
        width: Pixels.
        height: Pixels.
        steps: Denoising steps of a picture.
        guided: Classifier-free guidance: two rows a step, two prompts a request.
    """

    rate: float
    model: str
    width: int
    height: int
    steps: int
    guided: bool


@dataclass(frozen=True, slots=True)
class Headroom:
    """What is not counted on.

    Attributes:
        utilisation: Share of the cards' capacity that work may take.
        burst_reserve: Spare cards as a multiple of the square root of the busy ones.
        heat: Share of a card's cool speed that heat may take.
    """

    utilisation: float = PlanSettings().target_utilisation
    burst_reserve: float = PlanSettings().burst_reserve
    heat: float = 0.1


@dataclass(frozen=True, slots=True)
class Option:
    """Cards of one kind that would do one stage.

    Attributes:
        stage: `denoise`, or `text and decode`, which share their cards.
        card: Kind of card.
        work: Cards' worth of work, at their cool speed.
        cards: Whole cards, headroom included.
        watts: Of all of them at this load.
        joules_per_picture: Watts over the rate.
        usd_per_1000: Pictures; None where the kind has no price.
        estimates: What of this was not measured, in words; empty if all was.
        sources: Where the measured part comes from.
    """

    stage: str
    card: str
    work: float
    cards: int
    watts: float
    joules_per_picture: float
    usd_per_1000: float | None
    estimates: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def utilisation(self) -> float:
        """Share of the cards' cool capacity that is used."""
        return self.work / self.cards


def options(
    load: Load, cards: Sequence[str], headroom: Headroom, prices: Mapping[str, float]
) -> list[Option]:
    """Return what each kind of card would take for each stage, denoising first.

    Args:
        load: What is asked.
        cards: Keys of `LIMITS_W`.
        headroom: What is not counted on.
        prices: US dollars an hour of one card, by kind; may lack any.
    """
    step = step_cost(load.model, load.width, load.height, guided=load.guided)
    small = (text_cost(guided=load.guided), decode_cost(load.width, load.height))
    whole = Cost(step.seconds * load.steps, step.source, step.is_estimate)
    stages = (("denoise", (whole,)), ("text and decode", small))
    return [
        _option(stage, costs, card, load.rate, headroom, prices.get(card))
        for stage, costs in stages
        for card in cards
    ]


def is_priced(found: Sequence[Option]) -> bool:
    """True if every kind of card has a price, so that prices may decide."""
    return all(option.usd_per_1000 is not None for option in found)


def chosen(found: Sequence[Option]) -> list[Option]:
    """Return one option a stage: the cheapest if all are priced, else the one of fewest cards.

    Watts alone decide nothing, because most of them are estimates.
    """
    priced = is_priced(found)

    def price(option: Option) -> tuple[float, int, float]:
        return (option.usd_per_1000 or 0.0) if priced else 0.0, option.cards, option.watts

    return [min(group, key=price) for _, group in groupby(found, lambda option: option.stage)]


def cards_for(work: float, headroom: Headroom) -> int:
    """Return whole cards for so many cards' worth of work: at least one, never fewer than work."""
    busy = work / (1 - headroom.heat)
    wanted = max(busy / headroom.utilisation, busy + headroom.burst_reserve * math.sqrt(busy))
    return max(math.ceil(wanted * _EXACT), math.ceil(work), 1)


def _option(
    stage: str,
    costs: Sequence[Cost],
    card: str,
    rate: float,
    headroom: Headroom,
    price: float | None,
) -> Option:
    kind, power = KINDS[card], power_of(card, LIMITS_W[card])
    work = rate * sum(cost.seconds for cost in costs) / kind.speed
    cards = cards_for(work, headroom)
    watts = cards * power.idle_w + work * (power.busy_w - power.idle_w)
    estimates = [f"seconds: {cost.source}" for cost in costs if cost.is_estimate]
    if card != measured_card():
        estimates.append(
            f"speed of {card}, {kind.speed:g} of an {measured_card()}'s: {kind.source}"
        )
    if power.is_estimate:
        estimates.append(f"watts of {card}: {power.source}")
    elif stage != "denoise":
        estimates.append(f"watts of {card}: as when it denoises, which they were measured for")
    return Option(
        stage=stage,
        card=card,
        work=work,
        cards=cards,
        watts=watts,
        joules_per_picture=watts / rate,
        usd_per_1000=None if price is None else cards * price / 3600 / rate * 1000,
        estimates=tuple(estimates),
        sources=tuple(cost.source for cost in costs if not cost.is_estimate),
    )
