"""What a load test comes to: rates, latencies, what was in time, what failed, heat and energy."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.latencies import percentile
from loadtest.lateness import lateness_of
from loadtest.load_plan import LoadPlan
from loadtest.outcomes import Outcome
from loadtest.picture_proof import WRONG
from loadtest.status_log import StatusSample

LEAST_ADHERENCE = 0.5
"""Of the built-in model's pictures, of which some 0.85 are right where steps are few and many."""
# Codes by which a service says that it has too much to do, or that the caller's deadline passed:
# what a load test is made to provoke.
_SHED = ("overloaded", "limit_reached", "proxy_overloaded", "deadline_exceeded")


@dataclass(frozen=True)
class LoadRun:
    """One run.

    Attributes:
        plan: What was asked.
        outcomes: What became of it, by number.
        samples: Of the service's status.
        began: Time zero, by `time.time`.
        slo_s: What counts as in time.
    """

    plan: LoadPlan
    outcomes: Sequence[Outcome]
    samples: Sequence[StatusSample]
    began: float
    slo_s: float


def figures_of(run: LoadRun) -> dict[str, Any]:
    """Return a run's figures; units stand in the names, rates are per second."""
    asks, outcomes = run.plan.asks, run.outcomes
    right = [each for each in outcomes if not each.error]
    in_time = [each for each in right if each.latency_s <= run.slo_s]
    ends = [each.at + each.latency_s for each in right]
    span_s = max([run.plan.duration_s, *ends])
    errors = Counter(each.error for each in outcomes if each.error)
    return {
        "requests": {
            "due": len(asks),
            "right": len(right),
            "failed": sum(errors.values()),
            "unheard": len(asks) - len(outcomes),
            "shed": sum(errors[code] for code in _SHED),
            "wrong_pictures": sum(errors[code] for code in WRONG),
        },
        "arrival_rate": _round(len(asks) / run.plan.duration_s),
        "completion_rate": _round(len(right) / span_s),
        "drained_after_s": _round(span_s - run.plan.duration_s),
        "latency_s": _spread([each.latency_s for each in right]),
        "slo": {
            "seconds": _round(run.slo_s),
            "attainment": _round(len(in_time) / len(asks), 4),
            "goodput": _round(len(in_time) / span_s),
        },
        "errors": dict(errors.most_common()),
        "queue_s": _spread([each.queue_s for each in right if each.queue_s is not None]),
        "server_s": _spread([each.server_s for each in right if each.server_s is not None]),
        "doors": _grouped(run, lambda outcome: outcome.door),
        "steps": _grouped(run, lambda outcome: _asked(run, outcome)["num_inference_steps"]),
        "sizes": dict(
            Counter(f"{a.request['width']}x{a.request['height']}" for a in asks).most_common()
        ),
        "distinct_prompts": len({ask.request["prompt"] for ask in asks}),
        "energy": _energy(right),
        "cards": _cards(run.samples),
        "replicas": _replicas(run.samples),
        "lateness": lateness_of([each.late_s for each in outcomes]),
    }


def is_sound(figures: dict[str, Any]) -> bool:
    """Return whether a service did nothing that it may not do under any load.

    To refuse work is its right; to lose it, to break, or to answer with a wrong picture is not, be
    it of another size or of another thing.
    """
    requests = figures["requests"]
    return (
        requests["right"] > 0
        and requests["failed"] == requests["shed"]
        and not requests["unheard"]
        and shows_what_was_asked(figures)
    )


def shows_what_was_asked(figures: dict[str, Any]) -> bool:
    """Return whether the pictures that were judged, if any, show what their prompts state.

    No model is always right: only where even the upper end of the share's 95 % interval is below
    `LEAST_ADHERENCE` does a service draw other things than it was asked for.
    """
    adherence = figures.get("adherence") or {"judged": 0}
    return not adherence["judged"] or adherence["to"] >= LEAST_ADHERENCE


def _asked(run: LoadRun, outcome: Outcome) -> dict[str, Any]:
    return run.plan.asks[outcome.number].request


def _grouped(run: LoadRun, key: Callable[[Outcome], Any]) -> dict[str, Any]:
    groups: dict[Any, list[Outcome]] = {}
    for outcome in run.outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    return {
        str(name): {
            "requests": len(group),
            "right": sum(not each.error for each in group),
            "latency_s": _spread([each.latency_s for each in group if not each.error]),
        }
        for name, group in sorted(groups.items())
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    parts = {f"p{part}": percentile(ordered, part / 100) for part in (50, 90, 95, 99)}
    spread = {"mean": statistics.fmean(ordered), **parts, "max": ordered[-1]}
    return {name: _round(value, 4) for name, value in spread.items()}


def _energy(right: Sequence[Outcome]) -> dict[str, Any]:
    known = [each.joules for each in right if each.joules is not None]
    if not known:
        why = "no card of this service counts its energy" if right else "no picture was made"
        return {"joules_per_image": None, "why": why}
    return {"joules_per_image": _round(statistics.fmean(known), 2), "images": len(known)}


def _cards(samples: Sequence[StatusSample]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("temperature_c", "power_w"):
        values = [card[name] for each in samples for card in each.cards.values() if name in card]
        if values:
            found[name] = {
                "least": min(values),
                "median": statistics.median(values),
                "most": max(values),
            }
    return found or {"why": "no replica of this service reads a card"}


def _replicas(samples: Sequence[StatusSample]) -> dict[str, dict[str, int]]:
    pools = sorted({pool for each in samples for pool in each.replicas})
    counts = {pool: [each.replicas.get(pool, 0) for each in samples] for pool in pools}
    return {pool: {"least": min(of), "most": max(of)} for pool, of in counts.items()}


def _round(value: float, digits: int = 3) -> float:
    return round(value, digits)
