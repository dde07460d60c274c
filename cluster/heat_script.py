"""The file of a rehearsal: what the cards of a pool shall seem to read, over time.

```yaml
pools:                       # or `replicas` and `default` at the top, for every pool alike
  denoiser:
    replicas:                # the n-th replica of the pool reads the n-th entry
      - {temperature_c: 85, limit_c: 87, slowdown: 3}        # always the same
      - - {at_s: 0, temperature_c: 40, limit_c: 87, power_w: 120}
        - {at_s: 60, temperature_c: 86, limit_c: 87, power_w: 690, clocks_event_reasons: 0x20}
    default: {temperature_c: 40, limit_c: 87}                # all further ones
```

An entry is one point or a list of points in the order of their `at_s`, seconds since the file was
read (`cluster.scripted_heat` says when that is). Between two points what both tell goes in a
straight line, and what only the first tells stays, as the clocks-event reasons always do; after the
last point it stays. Before the first nothing is told. What a point leaves out the card does not
tell, but for `slowdown`, which then is 1. More replicas than entries read `default`, or the last
entry where there is none; a pool that the file does not name is told nothing.

`slowdown` is how many times as long each forward shall take.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from cluster.heat_reading import Reading

_LARGEST_BYTES = 1 << 20

_Celsius = Annotated[float, Field(ge=-100, le=200)]


class HeatScriptError(ValueError):
    """A script is wrong.

    Args:
        where: The setting in the file, dotted; empty for the file as a whole.
        value: What stands there.
        why: What is wrong with it, in words.
    """

    def __init__(self, where: str, value: Any, why: str) -> None:
        super().__init__(f"{where}: {why}" if where else why)
        self.where = where
        self.value = value


class Point(BaseModel):
    """What a card seems to read at one moment; None: not told."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    at_s: float = Field(0.0, ge=0)
    temperature_c: _Celsius | None = None
    memory_temperature_c: _Celsius | None = None
    limit_c: _Celsius | None = None
    margin_c: _Celsius | None = None
    power_w: float | None = Field(None, ge=0)
    power_cap_w: float | None = Field(None, gt=0)
    energy_j: float | None = Field(None, ge=0)
    sm_clock_mhz: float | None = Field(None, ge=0)
    clocks_event_reasons: int | None = Field(None, ge=0, lt=2**64)
    slowdown: float | None = Field(None, ge=1, le=1000)

    @model_validator(mode="after")
    def _margin_is_given_once(self) -> Point:
        if self.margin_c is not None and self.limit_c is not None:
            raise ValueError("give `margin_c` or `limit_c`, not both")
        if self.limit_c is not None and self.temperature_c is None:
            raise ValueError("`limit_c` needs `temperature_c`; without it give `margin_c`")
        return self

    def reading(self, at: float, problems: tuple[str, ...] = ()) -> Reading:
        """Return it as a reading that is marked as scripted."""
        margin = self.margin_c
        if self.limit_c is not None and self.temperature_c is not None:
            margin = self.limit_c - self.temperature_c
        return Reading(
            at=at,
            temperature_c=self.temperature_c,
            memory_temperature_c=self.memory_temperature_c,
            margin_c=margin,
            power_w=self.power_w,
            power_cap_w=self.power_cap_w,
            energy_j=self.energy_j,
            sm_clock_mhz=self.sm_clock_mhz,
            clocks_event_reasons=self.clocks_event_reasons,
            source="scripted",
            problems=problems,
            slowdown=1.0 if self.slowdown is None else self.slowdown,
        )


def _in_a_list(entry: Any) -> Any:
    return [entry] if isinstance(entry, Mapping) else entry


_Entry = Annotated[tuple[Point, ...], Field(min_length=1), BeforeValidator(_in_a_list)]


class PoolScript(BaseModel):
    """What the replicas of one pool seem to read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: tuple[_Entry, ...] = ()
    default: _Entry | None = None

    @field_validator("replicas", "default")
    @classmethod
    def _time_goes_forward(cls, value: Any) -> Any:
        entries = value if value and isinstance(value[0], tuple) else (value or (),)
        for points in entries:
            if any(later.at_s <= earlier.at_s for earlier, later in itertools.pairwise(points)):
                raise ValueError("each `at_s` must be larger than the one before")
        return value

    def entry(self, index: int) -> tuple[Point, ...]:
        """Return what the replica of that index, from 0, reads; empty if nothing."""
        if index < len(self.replicas):
            return self.replicas[index]
        return self.default or (self.replicas[-1] if self.replicas else ())


class HeatScript(PoolScript):
    """A whole file: by pool, or the same for every pool."""

    pools: dict[str, PoolScript] | None = None

    @model_validator(mode="after")
    def _says_something_in_one_way(self) -> HeatScript:
        at_the_top = bool(self.replicas or self.default)
        if at_the_top == (self.pools is not None):
            raise ValueError("give `replicas` and `default`, or `pools` with such, one of the two")
        return self

    def point(self, pool: str, index: int, t_s: float) -> Point | None:
        """Return what a replica reads at a time; None: the script does not say.

        Args:
            pool: The replica's pool.
            index: Of the replica in its pool, from 0.
            t_s: Seconds since the script began.
        """
        script = self if self.pools is None else self.pools.get(pool)
        points = () if script is None else script.entry(index)
        after = next((i for i, point in enumerate(points) if point.at_s > t_s), len(points))
        if after == 0:
            return None
        before = points[after - 1]
        return before if after == len(points) else _between(before, points[after], t_s)


def parse_heat_script(text: bytes) -> HeatScript:
    """Return the script in a YAML file's bytes.

    Raises:
        HeatScriptError: Naming the place, what stands there and what is wrong with it.
    """
    if len(text) > _LARGEST_BYTES:
        raise HeatScriptError("", len(text), f"it is larger than {_LARGEST_BYTES} bytes")
    try:
        loaded = yaml.safe_load(text)
    except (
        yaml.YAMLError,
        # What PyYAML lets through over tags that do not fit their values.
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise HeatScriptError("", None, f"it is not YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise HeatScriptError("", loaded, "it is not a mapping with `replicas` or `pools`")
    try:
        return HeatScript.model_validate(loaded)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise HeatScriptError(where, first["input"], first["msg"]) from None
    except RecursionError:  # YAML may refer to itself
        raise HeatScriptError("", None, "it refers to itself") from None


def _between(first: Point, second: Point, t_s: float) -> Point:
    share = (t_s - first.at_s) / (second.at_s - first.at_s)
    told: dict[str, Any] = {}
    for name in Point.model_fields:
        a, b = getattr(first, name), getattr(second, name)
        if a is not None and b is not None and name not in ("at_s", "clocks_event_reasons"):
            told[name] = a + (b - a) * share
    return first.model_copy(update=told)
