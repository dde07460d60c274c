"""What a run of `loadtest.soak` comes to: what grew, table and plot.

Growth is the Theil-Sen slope (the median of the slopes of all pairs of samples: Sen, Journal of the
American Statistical Association 63, 1968) over jobs, after the warm-up, times the jobs: a few
samples taken at a bad moment do not move it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from PIL import Image
from rich.table import Table
from scipy.stats import theilslopes

from loadtest.process_census import Process
from loadtest.trace_plot import Panel, draw_trace

WARM_UP = 1 / 3  # of the jobs
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """What there was at one moment.

    Attributes:
        at: Seconds of the run.
        done: Jobs that had ended.
        processes: Of Kelvin and Ray.
        object_store_bytes: In Ray's.
        objects: Of each prefix of the journal.
    """

    at: float
    done: int
    processes: Sequence[Process]
    object_store_bytes: float
    objects: Mapping[str, int]


@dataclass(frozen=True)
class _Bound:
    """By how much a quantity may seem to grow: a share of what it was, or so much."""

    share: float
    least: float


_BOUNDS = {
    "rss_mib": _Bound(0.05, 4.0),
    "descriptors": _Bound(0.05, 3.0),
    "object_store_mib": _Bound(0.05, 1.0),
    # Each job leaves two or more, were they not swept; between sweeps they come and go.
    "objects": _Bound(0.5, 50.0),
}
# SeaweedFS remembers what changed lately, in 33 buffers of at most 8 MiB that it fills one by one
# (BufferSize and PreviousBufferCount of its log_buffer.go), for longer than a soak takes. Its
# memory grew 3.9 KiB for each object put and deleted; a job has some seven. Of pictures and
# records, 80 KiB a job, it may keep none.
_RING_MIB_PER_JOB = {"weed": 40 / 1024}


def report_of(
    samples: Sequence[Sample], wrong: Sequence[Mapping[str, Any]], left: Mapping[str, int]
) -> dict[str, Any]:
    """Return every quantity's growth, and whether all is flat and every job ended rightly.

    Args:
        samples: In order.
        wrong: Jobs that ended as they should not.
        left: Of each prefix, after a sweep that kept nothing.
    """
    jobs = samples[-1].done
    kept = [each for each in samples if each.done >= WARM_UP * jobs]
    rows = [
        _growth(
            "rss_mib", f"{name} ({pid})", _of_process(pid, lambda one: one.rss_bytes / MIB), kept
        )
        for name, pid in _lasting(kept)
    ]
    rows += [
        _growth(
            "descriptors", f"{name} ({pid})", _of_process(pid, lambda one: one.descriptors), kept
        )
        for name, pid in _lasting(kept)
    ]
    rows.append(
        _growth(
            "object_store_mib", "Ray's object store", lambda one: one.object_store_bytes / MIB, kept
        )
    )
    rows += [_growth("objects", prefix, _of_prefix(prefix), kept) for prefix in kept[0].objects]
    swept = {prefix: left[prefix] for prefix in ("pending/", "jobs/", "images/")}
    return {
        "seconds": round(samples[-1].at, 1),
        "jobs_per_s": round(jobs / samples[-1].at, 2),
        "growth": rows,
        "grown": [f"{row['what']} {row['of']}" for row in rows if not row["flat"]],
        "came_or_went": _others(kept),
        "ok": not wrong and all(row["flat"] for row in rows) and not any(swept.values()),
    }


def _growth(
    what: str, of: str, value: Callable[[Sample], float | None], kept: Sequence[Sample]
) -> dict[str, Any]:
    points = [(each.done, found) for each in kept if (found := value(each)) is not None]
    slope = float(theilslopes([y for _, y in points], [x for x, _ in points])[0])
    level = median(y for _, y in points)
    grown = slope * (points[-1][0] - points[0][0])
    bound = _BOUNDS[what]
    allowed = max(bound.share * level, bound.least)
    ring = _RING_MIB_PER_JOB.get(of.split()[0], 0.0) if what == "rss_mib" else 0.0
    allowed += ring * (points[-1][0] - points[0][0])
    return {
        "what": what,
        "of": of,
        "first": round(points[0][1], 2),
        "median": round(level, 2),
        "last": round(points[-1][1], 2),
        "growth": round(grown, 3),
        "per_1000_jobs": round(1000 * slope, 3),
        "flat": grown <= allowed,
        "ring": ring > 0,
    }


def _of_process(pid: int, value: Callable[[Process], float]) -> Callable[[Sample], float | None]:
    def found(sample: Sample) -> float | None:
        return next((value(each) for each in sample.processes if each.pid == pid), None)

    return found


def _of_prefix(prefix: str) -> Callable[[Sample], float | None]:
    return lambda sample: sample.objects[prefix]


def _lasting(kept: Sequence[Sample]) -> list[tuple[str, int]]:
    """Return name and id of the processes that were there all the time."""
    there = [{(each.name, each.pid) for each in sample.processes} for sample in kept]
    return sorted(set.intersection(*there), key=lambda one: one[1])


def _others(kept: Sequence[Sample]) -> list[str]:
    ever = {(each.name, each.pid) for sample in kept for each in sample.processes}
    return sorted(f"{name} ({pid})" for name, pid in ever - set(_lasting(kept)))


def table_of(report: Mapping[str, Any]) -> Table:
    """Return the growth of every quantity as a table for people."""
    where = f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    table = Table(title=f"{report['jobs']} jobs, {report['jobs_per_s']} a second, {where}")
    for column in ("what", "of"):
        table.add_column(column)
    for column in ("first", "median", "last", "growth", ""):
        table.add_column(column, justify="right")
    for row in report["growth"]:
        numbers = (f"{row[name]:g}" for name in ("first", "median", "last", "growth"))
        said = "fills" if row["ring"] else "flat"
        table.add_row(row["what"], row["of"], *numbers, said if row["flat"] else "GROWS")
    table.add_row("jobs", "as they should", str(report["ended"]), "", "", "", "")
    return table


def draw_soak(samples: Sequence[Sample]) -> Image.Image:
    """Draw what was held over time."""
    seconds = [each.at for each in samples]
    jobs = samples[-1].done
    warm_at = next(each.at for each in samples if each.done >= WARM_UP * jobs)
    names = ("pipeline", "denoiser", "vae-decoder", "text-encoder", "ProxyActor", "raylet", "weed")

    def line(name: str, value: Callable[[Process], float]) -> Sequence[float | None]:
        return [
            max((value(each) for each in sample.processes if each.name == name), default=None)
            for sample in samples
        ]

    def total(value: Callable[[Process], float]) -> Sequence[float | None]:
        return [sum(map(value, sample.processes)) for sample in samples]

    panels = [
        Panel(
            f"resident memory of {', '.join(some)}, MiB",
            {name: line(name, lambda one: one.rss_bytes / MIB) for name in some},
        )
        for some in (names[:4], names[4:])
    ]
    panels += [
        Panel(
            "resident memory of all processes, MiB", {"": total(lambda one: one.rss_bytes / MIB)}
        ),
        Panel("file descriptors of all processes", {"": total(lambda one: one.descriptors)}),
        Panel(
            "in Ray's object store, MiB", {"": [each.object_store_bytes / MIB for each in samples]}
        ),
        Panel(
            "objects of the journal",
            {
                prefix: [float(each.objects[prefix]) for each in samples]
                for prefix in ("jobs/", "images/", "pending/", "leases/")
            },
        ),
    ]
    return draw_trace(seconds, panels, [(0.0, "warm-up"), (warm_at, "measured")])
