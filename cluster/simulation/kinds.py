"""Kinds of card as the simulation has them: speed, power, warmth and how they protect themselves.

The H100 is measured: step costs (`loadtest/data/step_costs_h100.json`), power and warmth
(`cluster/data/h100_thermal_model.json`), limits as NVML told them. L4 and A10G are estimates, none
of them measured by us: speeds from their arithmetic rates and FLUX on an L20, warmth such that a
loaded card in a server of room temperature sits in the seventies. No conclusion should rest on
their absolute figures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from cluster.card_kinds import card_kind
from cluster.simulation.thermal_fit import read_fitted
from cluster.simulation.thermal_model import ThermalParameters
from deployments.step_costs import StepCosts
from serve.errors import ConfigurationError

KindName = Literal["H100", "L4", "A10G"]
_STEP_COSTS = Path(__file__).parents[2] / "loadtest" / "data" / "step_costs_h100.json"


@dataclass(frozen=True)
class CardKind:
    """One kind of card.

    Attributes:
        name: As Ray calls accelerator types.
        speed: Of a cool card, 1 being an H100.
        load_w: Watts of the whole card while it computes, cool and without a lower cap.
        idle_w: Watts with the model loaded and nothing to do.
        thermal: How warm that makes it.
        limit_c: At which it begins to slow down: what NVML's margin counts to.
        brake_above_c: Beyond the limit by so much, it halves its clock at once.
        least_clock: Share of its usual clock that it never goes below.
        cost_per_hour: In US dollars (`cluster.card_kinds`).
        estimated: Speed, power or warmth was not measured by us.
    """

    name: KindName
    speed: float
    load_w: float
    idle_w: float
    thermal: ThermalParameters
    limit_c: float
    brake_above_c: float
    least_clock: float
    cost_per_hour: float
    estimated: bool


@cache
def kind(name: KindName) -> CardKind:
    """Return a kind of card.

    Raises:
        ConfigurationError: The fitted thermal model cannot be read.
    """
    cost = card_kind(name).cost_per_hour
    if name == "H100":
        # Slowdown 89, GPU max 87; 345 of about 1980 MHz.
        return CardKind(name, 1.0, 697.0, 120.0, read_fitted(), 87.0, 2.0, 0.17, cost, False)
    if name == "L4":
        # Passive, 72 W: 71 C under load in air of 28 C.
        warmth = ThermalParameters(28.0, 0.15, 2.0, 0.45, 60.0)
        return CardKind(name, 0.08, 72.0, 16.0, warmth, 85.0, 2.0, 0.10, cost, True)
    # Passive, capped at 300 W in AWS's G5: 73 C under load in air of 28 C.
    warmth = ThermalParameters(28.0, 0.05, 1.0, 0.10, 45.0)
    return CardKind(name, 0.07, 300.0, 25.0, warmth, 88.0, 4.0, 0.12, cost, True)


@cache
def step_costs(name: KindName, model: str) -> StepCosts:
    """Return the seconds of a forward on a cool card of a kind: the H100's, over its speed.

    Raises:
        ConfigurationError: Nothing is recorded of the model.
    """
    try:
        recorded = json.loads(_STEP_COSTS.read_text(encoding="utf-8"))[model]["costs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"There are no step costs of {model!r}: {error!r}", field="model", value=model
        ) from error
    speed = kind(name).speed
    slower = [{**entry, "seconds": entry["seconds"] / speed} for entry in recorded]
    return StepCosts.from_json({"costs": slower})
