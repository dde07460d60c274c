"""A load test, decided before it begins: what is asked for, through which door, and when.

The plan depends on its options and the model alone, so that two services, or one before and after
a change, can be given the very same load.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.profiles import LARGEST_RATE, LONGEST_S, NAMES, PROFILES, REPLAY, arrivals
from loadtest.prompt_set import prompts_for, read_prompts
from loadtest.request_mix import MIXES, VARIED, ModelFacts, RequestMix
from loadtest.trace_csv import Recorded, read_trace
from serve.errors import InvalidRequest

HTTP_DOORS = ("native", "openai", "comfyui")
HANDLE, MIXED = "handle", "mixed"
DOORS = (*HTTP_DOORS, HANDLE, MIXED)
MOST_REQUESTS = 1_000_000
DEFAULT_DURATION_S = 60.0


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says.

    Attributes:
        profile: One of `profiles.NAMES`.
        rate: Mean requests a second; a replay has its own.
        duration_s: Of arrivals; of a replay, as far as it goes if absent.
        door: One of `DOORS`.
        mix: One of `request_mix.MIXES`.
        prompts: A set or a file; the set that fits the model if absent.
        trace: Of a replay.
        seed: Of everything drawn.
    """

    profile: str = "steady"
    rate: float = 1.0
    duration_s: float | None = None
    door: str = "native"
    mix: str = VARIED
    prompts: str | None = None
    trace: Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise InvalidRequest where an option or its file is wrong, alone or with the others."""
        for name, value, allowed in (
            ("profile", self.profile, NAMES),
            ("door", self.door, DOORS),
            ("mix", self.mix, MIXES),
        ):
            if value not in allowed:
                raise InvalidRequest(
                    f"There is no such {name}.", field=name, value=value, allowed=_one_of(allowed)
                )
        for name, number, most in (
            ("rate", self.rate, LARGEST_RATE),
            ("duration", self.duration_s, LONGEST_S),
        ):
            if number is not None and not (isinstance(number, int | float) and 0 < number <= most):
                raise InvalidRequest(
                    f"The {name} is out of range.",
                    field=name,
                    value=number,
                    allowed=f"above 0, at most {most:g}",
                )
        if not isinstance(self.seed, int):
            raise InvalidRequest(
                "The seed is no number.", field="seed", value=self.seed, allowed="an integer"
            )
        if self.rate * (self.duration_s or DEFAULT_DURATION_S) > MOST_REQUESTS:
            raise InvalidRequest(
                "Too many requests would be due.",
                field="duration",
                value=self.duration_s,
                allowed=f"rate x duration of at most {MOST_REQUESTS}",
            )
        if (self.profile == REPLAY) != (self.trace is not None):
            raise InvalidRequest(
                "A replay needs a trace, and only a replay takes one.",
                field="trace",
                value=None if self.trace is None else str(self.trace),
                allowed=f"--profile {REPLAY} --trace FILE.csv, or neither",
            )
        if self.trace is not None:
            read_trace(self.trace)
        if self.prompts is not None:
            read_prompts(self.prompts)


@dataclass(frozen=True)
class Ask:
    """One request of a plan: its number, when it is due in seconds, the door, and its fields."""

    number: int
    at: float
    door: str
    request: dict[str, Any]


@dataclass(frozen=True)
class LoadPlan:
    """All requests of a run, by when they are due, and how many seconds they may come in."""

    asks: tuple[Ask, ...]
    duration_s: float

    def until(self, seconds: float) -> LoadPlan:
        """Return what of it was due in so many seconds of the run, above 0."""
        asks = tuple(each for each in self.asks if each.at <= seconds)
        return LoadPlan(asks, min(seconds, self.duration_s))

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        told = {"duration_s": self.duration_s, "asks": [asdict(each) for each in self.asks]}
        file.write_text(json.dumps(told), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> LoadPlan:
        """Return what `write` has written."""
        told = json.loads(file.read_text(encoding="utf-8"))
        return cls(tuple(Ask(**each) for each in told["asks"]), told["duration_s"])


def make_plan(options: PlanOptions, model: ModelFacts, doors: Sequence[str]) -> LoadPlan:
    """Return the plan of a run.

    Args:
        options: Of the run.
        model: That is to draw.
        doors: Among which requests are spread evenly, at random.

    Raises:
        InvalidRequest: An option is wrong, or no request would be due.
    """
    options.check()
    rows = _rows(options)
    if not rows:
        raise InvalidRequest(
            "No request would be due in this run.",
            field="duration",
            value=options.duration_s,
            allowed="a higher rate, or longer",
        )
    prompts = read_prompts(options.prompts or prompts_for(model.name))
    mix = RequestMix(model, prompts, options.mix, options.seed)
    turn = random.Random(f"doors {options.seed}")
    asks = tuple(
        Ask(number, row.at, turn.choice(doors), {**mix.request(number), **row.fields})
        for number, row in enumerate(rows)
    )
    return LoadPlan(asks, _duration_s(options, rows))


def _rows(options: PlanOptions) -> list[Recorded]:
    if options.trace is not None:
        end = options.duration_s if options.duration_s is not None else LONGEST_S
        return [row for row in read_trace(options.trace) if row.at <= end]
    duration_s = options.duration_s or DEFAULT_DURATION_S
    profile = PROFILES[options.profile]
    return [Recorded(at) for at in arrivals(profile, options.rate, duration_s, options.seed)]


def _duration_s(options: PlanOptions, rows: Sequence[Recorded]) -> float:
    if options.duration_s is not None:
        return options.duration_s
    # Of a recorded load, the last request ends it.
    return max(rows[-1].at, 1.0) if options.trace is not None else DEFAULT_DURATION_S


def _one_of(names: Sequence[str]) -> str:
    return "one of: " + ", ".join(names)
