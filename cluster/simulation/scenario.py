"""Scenario files: cards, traffic and what happens to them, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.simulation.kinds import KindName
from serve.errors import ConfigurationError

SCENARIOS = Path(__file__).parents[1] / "scenarios"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Steady(_Section):
    """Poisson arrivals of one rate."""

    shape: Literal["steady"] = "steady"


class Burst(_Section):
    """Poisson arrivals whose rate is a multiple at times; the load is meant between them."""

    shape: Literal["burst"]
    factor: float = Field(5.0, gt=0)
    starts_s: tuple[float, ...] = Field(min_length=1)
    lasts_s: float = Field(gt=0)


class Diurnal(_Section):
    """Poisson arrivals whose rate follows a cosine, lowest at the beginning."""

    shape: Literal["diurnal"]
    period_s: float = Field(86400.0, gt=0)
    swing: float = Field(0.6, ge=0, le=1, description="share of the mean, up and down")


class Recorded(_Section):
    """Arrivals from a CSV: at_s, width, height, num_inference_steps, guidance_scale."""

    shape: Literal["recorded"]
    file: Path


class Traffic(_Section):
    """What comes, and when."""

    load: float = Field(
        0.5, gt=0, le=3, description="mean work that comes, as a share of what all cards do cool"
    )
    arrivals: Steady | Burst | Diurnal | Recorded = Field(Steady(), discriminator="shape")
    sides: dict[int, float] = Field(
        {1024: 0.5, 512: 0.5}, description="pixels of a side -> weight", min_length=1
    )
    steps: dict[int, float] = Field({28: 1.0}, description="steps -> weight", min_length=1)
    unguided: float = Field(0.0, ge=0, le=1, description="share of requests without guidance")

    @model_validator(mode="after")
    def _drawable(self) -> Traffic:
        if any(side < 64 or side > 2048 or side % 16 for side in self.sides):
            raise ValueError("sides are multiples of 16 from 64 to 2048")
        if any(step < 1 or step > 200 for step in self.steps):
            raise ValueError("steps are 1 to 200")
        if any(not weight > 0 for each in (self.sides, self.steps) for weight in each.values()):
            raise ValueError("weights must be above 0")
        return self


class Cards(_Section):
    """The cards of one kind; one denoiser pool runs on them."""

    kind: KindName
    number: int = Field(ge=1, le=100_000, description="no policy can have more")
    initial: int = Field(ge=1, description="replicas that run at the beginning")
    minimum: int = Field(1, ge=1)
    start_s: float = Field(60.0, gt=0, description="from asking for a replica to its first request")
    spread: float = Field(
        0.08, ge=0, le=0.5, description="of the resistance into the air, from card to card"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Cards:
        if not self.minimum <= self.initial <= self.number:
            raise ValueError("minimum <= initial <= number is required")
        return self


class StageSettings(_Section):
    """The text or the decode stage: one request at a time on cards that stay cool."""

    kind: KindName
    seconds: float = Field(gt=0, description="a request")
    initial: int = Field(1, ge=1)
    minimum: int = Field(1, ge=1)
    maximum: int = Field(4, ge=1)
    start_s: float = Field(30.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> StageSettings:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError("minimum <= initial <= maximum is required")
        return self


class Ambient(_Section):
    """The air gets warmer, or cooler again, everywhere."""

    what: Literal["ambient"]
    at_s: float = Field(ge=0)
    by_c: float
    within_s: float = Field(60.0, gt=0)


class FailedCooling(_Section):
    """Fans of some cards fail: a share of each kind, drawn by the seed."""

    what: Literal["failed-cooling"]
    at_s: float = Field(ge=0)
    share: float = Field(gt=0, le=1)
    hindrance: float = Field(gt=0, description="factor on the resistance into the air")


class PowerCap(_Section):
    """Some cards may draw only so much."""

    what: Literal["power-cap"]
    at_s: float = Field(ge=0)
    share: float = Field(gt=0, le=1)
    of_load: float = Field(gt=0, le=1, description="the cap, over what they draw under load")


class SpotReclaims(_Section):
    """Cards are taken away with little notice and come back."""

    what: Literal["spot-reclaims"]
    per_card_hour: float = Field(gt=0)
    notice_s: float = Field(30.0, ge=0)
    away_s: float = Field(600.0, gt=0)


Event = Annotated[Ambient | FailedCooling | PowerCap | SpotReclaims, Field(discriminator="what")]


class Scenario(_Section):
    """One simulated stretch of time of one cluster."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str
    seeds: tuple[int, ...] = Field((1, 2, 3, 4, 5), min_length=1)
    tuning_seeds: tuple[int, ...] = Field(
        (101, 102), description="rivals' settings are chosen on these"
    )
    duration_s: float = Field(gt=0)
    warm_up_s: float = Field(120.0, ge=0, description="not counted in any figure")
    model: Literal["large", "medium"] = "large"
    cards: tuple[Cards, ...] = Field(min_length=1)
    text: StageSettings
    decode: StageSettings
    traffic: Traffic = Traffic()
    events: tuple[Event, ...] = ()
    reference_kind: KindName = Field(description="unloaded latency is meant on this kind")
    slo_factor: float = Field(3.0, gt=1, description="times the unloaded latency")
    keep_choice_steps: int = Field(4, ge=1, description="steps until `choose` is asked again")
    decide_every_s: float = Field(1.0, gt=0)
    report_every_s: float = Field(1.0, gt=0, description="a replica's load to the router")

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        kinds = [cards.kind for cards in self.cards]
        if len(set(kinds)) < len(kinds):
            raise ValueError("each kind of card may be listed once")
        if self.warm_up_s >= self.duration_s:
            raise ValueError("warm_up_s must be below duration_s")
        if set(self.seeds) & set(self.tuning_seeds):
            raise ValueError("tuning_seeds must be other seeds")
        return self


HELD_OUT_SEEDS = (801, 802, 803, 804, 805)
"""Seeds that nobody looked at while settings were chosen."""


def load_scenario(name_or_path: str) -> Scenario:
    """Read a scenario by its name among those shipped, or from a YAML file.

    Raises:
        ConfigurationError: There is no such file, or something in it is wrong.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SCENARIOS / f"{name_or_path}.yaml"
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(
            "The scenario cannot be read.",
            field="scenario",
            value=name_or_path,
            allowed=f"a YAML file, or one of {', '.join(scenario_names())}",
        ) from error
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            "A scenario file is a YAML mapping.", field="scenario", value=name_or_path
        )
    return parse_scenario(given)


def parse_scenario(given: Mapping[str, Any]) -> Scenario:
    """Check a scenario.

    Raises:
        ConfigurationError: Something in it is wrong; the error names the field.
    """
    try:
        return Scenario.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigurationError(
            f"The scenario is wrong: {first['msg']}",
            field=".".join(str(part) for part in first["loc"]) or "scenario",
            value=str(first.get("input"))[:200],
        ) from error


def held_out_names() -> list[str]:
    """Return the scenarios that no setting was chosen by, beside those of the suite."""
    return ["bursts-apart", "bursts-close"]


def scenario_names() -> list[str]:
    """Return the names of the shipped scenarios that make up the suite, in their order."""
    return [
        "steady",
        "burst",
        "diurnal",
        "failed-cooling",
        "hot-aisle",
        "mixed-kinds",
        "spot-reclaims",
    ]
