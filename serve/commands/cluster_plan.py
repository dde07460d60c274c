"""`kelvin cluster plan`: what was typed, judged, and the plan in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from cluster.capacity_plan import (
    LIMITS_W,
    Headroom,
    Load,
    Option,
    chosen,
    is_priced,
    options,
)
from cluster.measured_speeds import STEPS_OF
from serve.commands.output import EXIT_OK, console, write_json
from serve.errors import InvalidRequest

_MOST_STEPS = 200
_HIGHEST_RATE = 1e6
LONGEST_SIDE_OF = {"large": 3072, "large-turbo": 3072, "medium": 4096}
"""Pixels, by model: where its table of positions ends; Medium's is longer than one would plan for.
Pictures of no size up to it need more memory than any card that is planned with has."""


@dataclass(frozen=True)
class Asked:
    """The options as they were typed."""

    rate: Any
    size: str
    steps: Any
    model: str
    guidance: bool | None
    cards: tuple[str, ...]
    heat_headroom: Any
    utilisation: Any
    prices: tuple[str, ...]


def plan(asked: Asked, *, as_json: bool) -> int:
    """Print the plan.

    Raises:
        InvalidRequest: An option is out of range or names what there is not.
    """
    load = _load(asked)
    cards = [_card(card, "card") for card in dict.fromkeys(asked.cards)] or list(LIMITS_W)
    headroom = Headroom(
        utilisation=_within(asked.utilisation, "utilisation", 0.05, 1.0),
        heat=_within(asked.heat_headroom, "heat_headroom", 0.0, 0.9),
    )
    found = options(load, cards, headroom, dict(_price(price) for price in asked.prices))
    best = chosen(found)
    if as_json:
        write_json(
            {
                "load": asdict(load),
                "headroom": asdict(headroom),
                "options": [_body(option) for option in found],
                "chosen_by": _why(found),
                "chosen": [_body(option) for option in best],
                "total": _total(best),
            }
        )
    else:
        _print(load, headroom, found, best)
    return EXIT_OK


def _load(asked: Asked) -> Load:
    if asked.model not in STEPS_OF:
        raise InvalidRequest(
            f"No speeds are known of a model {asked.model!r}.",
            field="model",
            value=asked.model,
            allowed=", ".join(STEPS_OF),
        )
    turbo = asked.model == "large-turbo"
    steps = (4 if turbo else 28) if asked.steps is None else asked.steps
    if not isinstance(steps, int) or not 1 <= steps <= _MOST_STEPS:
        raise InvalidRequest(
            "The number of steps is out of range.",
            field="steps",
            value=steps,
            allowed=f"a whole number from 1 to {_MOST_STEPS}",
        )
    width, height = _size(asked.size, LONGEST_SIDE_OF[asked.model])
    return Load(
        rate=_within(asked.rate, "rate", 1e-6, _HIGHEST_RATE),
        model=asked.model,
        width=width,
        height=height,
        steps=steps,
        guided=not turbo if asked.guidance is None else asked.guidance,
    )


def _size(text: str, longest: int) -> tuple[int, int]:
    matched = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.strip().lower())
    if matched is not None:
        width = int(matched[1])
        height = int(matched[2] or width)
        if all(16 <= side <= longest and side % 16 == 0 for side in (width, height)):
            return width, height
    raise InvalidRequest(
        "This is no size of a picture.",
        field="size",
        value=text,
        allowed=f"one side or WIDTHxHEIGHT in pixels, multiples of 16 up to {longest}",
    )


def _card(name: str, field: str) -> str:
    for known in LIMITS_W:
        if known.lower() == name.strip().lower():
            return known
    raise InvalidRequest(
        f"There are no plans for a card {name!r}.",
        field=field,
        value=name,
        allowed=", ".join(LIMITS_W),
    )


def _price(text: str) -> tuple[str, float]:
    name, _, typed = text.partition("=")
    try:
        price = float(typed)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise InvalidRequest(
            "This is no price.", field="price", value=text, allowed="KIND=USD an hour, as H100=6.9"
        )
    return _card(name, "price"), price


def _within(value: Any, field: str, least: float, most: float) -> float:
    if not isinstance(value, float | int) or not least <= value <= most:
        raise InvalidRequest(
            f"Option {field} is out of range.",
            field=field,
            value=value,
            allowed=f"a number from {least:g} to {most:g}",
        )
    return float(value)


def _body(option: Option) -> dict[str, Any]:
    return {**asdict(option), "utilisation": option.utilisation}


def _why(found: Sequence[Option]) -> str:
    return "lowest price" if is_priced(found) else "fewest cards"


def _total(best: Sequence[Option]) -> dict[str, Any]:
    prices = [option.usd_per_1000 for option in best if option.usd_per_1000 is not None]
    return {
        "cards": sum(option.cards for option in best),
        "watts": sum(option.watts for option in best),
        "joules_per_picture": sum(option.joules_per_picture for option in best),
        "usd_per_1000": sum(prices) if len(prices) == len(best) else None,
    }


def _print(load: Load, headroom: Headroom, found: Sequence[Option], best: Sequence[Option]) -> None:
    out = console()
    guided = "with" if load.guided else "without"
    out.print(
        f"{load.rate:g} pictures/s of {load.model}, {load.width}x{load.height}, {load.steps} steps "
        f"{guided} guidance",
        style="bold",
        soft_wrap=True,
    )
    priced = any(option.usd_per_1000 is not None for option in found)
    table = Table(pad_edge=False)
    table.add_column("stage")
    table.add_column("card")
    for heading in ("cards", "used", "W", "J/picture", *(["USD/1000"] if priced else [])):
        table.add_column(heading, justify="right")
    notes: dict[str, int] = {}
    for option in found:
        marks = [str(notes.setdefault(each, len(notes) + 1)) for each in option.estimates]
        cells = [
            option.stage,
            option.card,
            str(option.cards),
            f"{option.utilisation:.0%}",
            f"{option.watts:,.0f}",
            f"{option.joules_per_picture:,.0f}" + (f" ~{','.join(marks)}" if marks else ""),
        ]
        if priced:
            cost = option.usd_per_1000
            cells.append("" if cost is None else f"{cost:,.2f}")
        table.add_row(*cells, style="bold" if option in best else None)
    out.print(table)
    total = _total(best)
    said = " and ".join(f"{option.cards} {option.card} for {option.stage}" for option in best)
    cost = total["usd_per_1000"]
    out.print(
        f"{_why(found)}: {said}; {total['watts']:,.0f} W, "
        f"{total['joules_per_picture']:,.0f} J a picture"
        + ("" if cost is None else f", {cost:,.2f} USD per 1000 pictures"),
        soft_wrap=True,
    )
    out.print(
        f"Headroom: {headroom.heat:.0%} of each card's speed for heat, cards filled to "
        f"{headroom.utilisation:.0%} at most so that queues stay short; used is of cool speed. "
        "Watts are of the cards alone.",
        soft_wrap=True,
    )
    for source in dict.fromkeys(each for option in found for each in option.sources):
        out.print(Text(f"measured: {source}"), soft_wrap=True)
    for note, mark in notes.items():
        out.print(Text(f"~{mark} estimate, {note}"), soft_wrap=True)
