"""What a run of `loadtest.overload` comes to: figures, targets, table and plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from PIL import Image
from rich.table import Table

from loadtest.latencies import percentile
from loadtest.open_loop import NO_ANSWER, Answer
from loadtest.process_census import Process
from loadtest.trace_plot import Panel, draw_trace

MOST_GROWTH = 0.10
# Of the p95 before. Fifty requests of a Poisson process differ that much from the next fifty.
USUAL_AGAIN = 1.5
_MEANS_OF_S = 5.0


@dataclass(frozen=True)
class Phase:
    """A part of the run and its requests; seconds of the run."""

    name: str
    begin: float
    end: float
    answers: Sequence[Answer]


@dataclass
class Run:
    """All that was seen.

    Attributes:
        deadline_s: Of each request.
        phases: In order: saturation, rehearsal, usual load, overload, usual load again.
        again: Refusals, and what came of asking again when told to.
        census: Second of the run, and all processes then.
    """

    deadline_s: float
    phases: list[Phase] = field(default_factory=list)
    again: list[tuple[Answer, Answer]] = field(default_factory=list)
    census: list[tuple[float, list[Process]]] = field(default_factory=list)


def report_of(run: Run) -> dict[str, Any]:
    """Return all figures, whether each target is met, and whether all are."""
    _, rehearsal, usual, over, after = run.phases
    usually = [each for each in usual.answers if each.at >= rehearsal.end + run.deadline_s]
    late = [each for each in after.answers if each.at >= over.end + run.deadline_s]
    figures: dict[str, Any] = {
        "rehearsal": overload_figures(rehearsal, run.deadline_s),
        "usual": latency_figures(usually),
        "overload": overload_figures(over, run.deadline_s),
        "asked_again": again_figures(run, over.end),
        "one_deadline_after": latency_figures(late),
        "generator": {phase.name: lateness(phase.answers) for phase in run.phases},
        "memory": growth(run.census, usual, over, after),
    }
    met = {
        "accepted p95 within the deadline": _at_most(figures["overload"]["p95_s"], run.deadline_s),
        "all others are 429 with Retry-After": not figures["overload"]["neither"],
        "no process grew by a tenth": not figures["memory"]["grown"],
        "usual latency one deadline after": figures["one_deadline_after"]["not_done"] == 0
        and _at_most(
            figures["one_deadline_after"]["p95_s"],
            USUAL_AGAIN * (figures["usual"]["p95_s"] or 0.0),
        ),
    }
    return {**figures, "targets": met, "ok": all(met.values())}


def latency_figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how long pictures took, from when they were due, and how many were not made."""
    seconds = sorted(each.seconds for each in answers if each.status == 200)
    return {
        "requests": len(answers),
        "not_done": len(answers) - len(seconds),
        **{name: _percentile(seconds, share) for name, share in _SHARES.items()},
    }


_SHARES = {"p50_s": 0.5, "p95_s": 0.95, "slowest_s": 1.0}


def overload_figures(over: Phase, deadline_s: float) -> dict[str, Any]:
    """Return what became of the requests of the overload.

    A job that was accepted and failed counts with the time it took to fail, or its deadline if that
    is longer.
    """
    accepted = [each for each in over.answers if not each.is_refused and each.status != NO_ANSWER]
    seconds = sorted(
        (each.job_s or 0.0) if each.status == 200 else max(each.seconds, 1.01 * deadline_s)
        for each in accepted
    )
    neither = Counter(
        f"{each.status} {each.code}".strip()
        for each in over.answers
        if each.status != 200 and not each.is_refused
    )
    refused = sorted(each.retry_after_s or 0.0 for each in over.answers if each.is_refused)
    made = [each for each in over.answers if each.status == 200]
    answered = sorted(each.seconds for each in over.answers if each.is_refused)
    length_s = over.end - over.begin
    return {
        "offered": len(over.answers),
        "offered_per_s": round(len(over.answers) / length_s, 1),
        "accepted": len(accepted),
        "made_per_s": round(len(made) / length_s, 2),
        "in_time": sum((each.job_s or 0.0) <= deadline_s for each in made),
        **{name: _percentile(seconds, share) for name, share in _SHARES.items()},
        "refused": len(refused),
        "refused_within": {name: _percentile(answered, share) for name, share in _SHARES.items()},
        "retry_after": {name: _percentile(refused, share) for name, share in _SHARES.items()},
        "neither": dict(neither),
    }


def again_figures(run: Run, over_at: float) -> dict[str, Any]:
    """Return what came of waiting as long as `Retry-After` said, meanwhile and afterwards."""

    def figures(pairs: Sequence[Answer]) -> dict[str, Any]:
        return {
            "asked": len(pairs),
            "made": sum(each.status == 200 for each in pairs),
            "refused_again": sum(each.is_refused for each in pairs),
        }

    return {
        "meanwhile": figures([each for _, each in run.again if each.at < over_at]),
        "afterwards": figures([each for _, each in run.again if each.at >= over_at]),
    }


def lateness(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Return by how many seconds requests were sent later than they were due."""
    late = sorted(each.late_s for each in answers)
    return {f"late_{name}": _percentile(late, share) for name, share in _SHARES.items()}


def growth(
    census: Sequence[tuple[float, Sequence[Process]]], usual: Phase, over: Phase, after: Phase
) -> dict[str, Any]:
    """Return each process's resident MiB before, at most during, and after the overload."""
    before_s = usual.end - _MEANS_OF_S, usual.end
    after_s = after.end - _MEANS_OF_S, after.end
    rows: list[dict[str, Any]] = []
    for pid, name in sorted({(each.pid, each.name) for _, found in census for each in found}):

        def resident(begin: float, end: float, pid: int = pid) -> list[float]:
            return [
                each.rss_bytes / 2**20
                for at, found in census
                for each in found
                if each.pid == pid and begin <= at <= end
            ]

        before, now = resident(*before_s), resident(*after_s)
        if not before or not now:
            continue  # it came or went
        peak = max(resident(over.begin, over.end), default=0.0)
        rows.append(
            {
                "name": name,
                "pid": pid,
                "before_mib": round(median(before), 1),
                "peak_mib": round(peak, 1),
                "after_mib": round(median(now), 1),
                "growth": round(max(peak, median(now)) / median(before) - 1, 4),
            }
        )
    return {
        "processes": rows,
        "grown": [row["name"] for row in rows if row["growth"] >= MOST_GROWTH],
    }


def table_of(report: dict[str, Any]) -> Table:
    """Return the figures as a table for people."""
    where = f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    over, again = report["overload"], report["asked_again"]
    table = Table(title=f"{report['times']:g} times saturation, {report['seconds']:g} s, {where}")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for what, measured in (
        ("saturation, jobs/s", report["saturation"]["jobs_per_s"]),
        ("in rehearsal accepted; of those in time", _in_time(report["rehearsal"])),
        ("offered, requests/s", over["offered_per_s"]),
        ("made, jobs/s", over["made_per_s"]),
        ("accepted; of those in time", _in_time(over)),
        (f"accepted p95, s of {report['deadline_s']:g}", over["p95_s"]),
        ("refused; within p95 s", f"{over['refused']}; {over['refused_within']['p95_s']}"),
        ("neither made nor 429 with Retry-After", over["neither"] or "none"),
        ("asked again as told, and made", _of(again["meanwhile"])),
        ("the same, told to come after the overload", _of(again["afterwards"])),
        ("usual p95 before, s", report["usual"]["p95_s"]),
        ("usual p95 one deadline after, s", report["one_deadline_after"]["p95_s"]),
        ("generator late p95, s", report["generator"]["overload"]["late_p95_s"]),
    ):
        table.add_row(what, str(measured))
    for row in report["memory"]["processes"]:
        sizes = f"{row['before_mib']} -> {row['peak_mib']} -> {row['after_mib']} MiB"
        table.add_row(f"{row['name']}: before, peak, after", f"{sizes}, {row['growth']:+.1%}")
    for target, met in report["targets"].items():
        table.add_row(target, "met" if met else "MISSED")
    return table


def draw_run(run: Run) -> Image.Image:
    """Draw, second by second, what was offered and answered, how late, and the processes' sizes."""
    answers = [each for phase in run.phases for each in phase.answers]
    last = int(max(each.at for each in answers)) + 1
    seconds = list(range(last + 1))
    by_second: list[list[Answer]] = [[] for _ in seconds]
    for each in answers:
        by_second[int(each.at)].append(each)

    def slowest(now: list[Answer]) -> float | None:
        return max((each.seconds for each in now if each.status == 200), default=None)

    panels = [
        Panel(
            "requests a second, by when they were due",
            {
                "refused": [float(sum(each.is_refused for each in now)) for now in by_second],
                "made": [float(sum(each.status == 200 for each in now)) for now in by_second],
            },
        ),
        Panel(
            "slowest picture, s",
            {"": [slowest(now) for now in by_second]},
            [(run.deadline_s, "deadline")],
        ),
        Panel(
            "longest Retry-After, s",
            {
                "": [
                    max(
                        (each.retry_after_s or 0.0 for each in now if each.is_refused), default=None
                    )
                    for now in by_second
                ]
            },
        ),
        Panel("resident memory, MiB", _sizes(run, seconds)),
    ]
    return draw_trace(seconds, panels, [(phase.begin, phase.name) for phase in run.phases])


def _sizes(run: Run, seconds: Sequence[int]) -> dict[str, Sequence[float | None]]:
    """Return the sizes of the processes that have most to do with requests."""
    lines: dict[str, Sequence[float | None]] = {}
    for name in ("pipeline", "denoiser", "ProxyActor", "weed"):
        line: list[float | None] = [None for _ in seconds]
        for at, found in run.census:
            sizes = [each.rss_bytes / 2**20 for each in found if each.name == name]
            if sizes and int(at) < len(line):
                line[int(at)] = max(sizes)
        lines[name] = line
    return lines


def _in_time(figures: dict[str, Any]) -> str:
    return f"{figures['accepted']}; {figures['in_time']}"


def _of(figures: dict[str, Any]) -> str:
    return f"{figures['made']} of {figures['asked']}"


def _at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _percentile(values: Sequence[float], share: float) -> float | None:
    return round(percentile(values, share), 3) if values else None
