"""What was measured of telemetry's cost, as figures with intervals, targets and verdicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from loadtest import paired_cost
from loadtest.paired_cost import Pair

MOST_THROUGHPUT_LOST = 0.01
MOST_LATENCY_S = 0.003


@dataclass
class Measured:
    """Of the same work, again and again; each pair is without telemetry and with it.

    Attributes:
        seconds: That a caller waited.
        cpu: Processor seconds of all processes.
        by_process: Sums of those, of each process without and with.
    """

    seconds: list[Pair] = field(default_factory=list)
    cpu: list[Pair] = field(default_factory=list)
    by_process: tuple[dict[str, float], dict[str, float]] = field(
        default_factory=lambda: (defaultdict(float), defaultdict(float))
    )


def latency_report(measured: Measured) -> dict[str, Any]:
    """Return what a picture takes longer, in seconds, with its 95 % interval."""
    found = paired_cost.cost(measured.seconds, paired_cost.median_added)
    return {
        **_figures(measured, "added_s", found, 5),
        "target": {"at_most_s": MOST_LATENCY_S, "verdict": found.verdict(MOST_LATENCY_S)},
        "cpu_s": _cpu(measured, 1),
    }


def throughput_report(measured: Measured, pictures: int, callers: int) -> dict[str, Any]:
    """Return the share of the throughput that is lost, with its 95 % interval.

    Args:
        measured: Of so many pictures at a time.
        pictures: That many.
        callers: Who asked for them together.
    """
    found = paired_cost.cost(measured.seconds, paired_cost.lost_share)
    return {
        "callers": callers,
        "pictures_each": pictures,
        **_figures(measured, "lost_share", found, 4),
        "target": {"at_most": MOST_THROUGHPUT_LOST, "verdict": found.verdict(MOST_THROUGHPUT_LOST)},
        "cpu_s": _cpu(measured, pictures),
    }


def _figures(measured: Measured, name: str, found: paired_cost.Cost, digits: int) -> dict[str, Any]:
    means = [sum(each) / len(measured.seconds) for each in zip(*measured.seconds, strict=True)]
    return {
        "pairs": len(measured.seconds),
        "groups": found.groups,
        "off_mean_s": round(means[0], 4),
        "on_mean_s": round(means[1], 4),
        name: round(found.mean, digits),
        f"{name}_95": [round(found.low, digits), round(found.high, digits)],
    }


def _cpu(measured: Measured, pictures: int) -> dict[str, Any]:
    """Return processor time a picture: of all, what is added, and that of each process."""
    added = paired_cost.cost(measured.cpu, paired_cost.mean_added)
    share = paired_cost.cost(measured.cpu, paired_cost.lost_share)
    made = len(measured.cpu) * pictures
    off, on = (sum(each) / made for each in zip(*measured.cpu, strict=True))
    names = sorted({name for each in measured.by_process for name in each})
    return {
        "off": round(off, 4),
        "on": round(on, 4),
        "added": round(added.mean / pictures, 5),
        "added_95": [round(added.low / pictures, 5), round(added.high / pictures, 5)],
        "share_of_all": round(share.mean, 4),
        "share_of_all_95": [round(share.low, 4), round(share.high, 4)],
        "added_by_process": {
            name: round((measured.by_process[1][name] - measured.by_process[0][name]) / made, 5)
            for name in names
        },
    }


def of_model_report(cpu_s: float, added: Mapping[str, Any]) -> dict[str, Any]:
    """Return what share of a model's picture is added, by processor time.

    Args:
        cpu_s: Processor time of one of its pictures.
        added: To one, as `throughput_report` has it.
    """
    low, high = (each / cpu_s for each in added["added_95"])
    share = paired_cost.Cost(added["added"] / cpu_s, low, high, paired_cost.GROUPS)
    return {
        "cpu_s": round(cpu_s, 4),
        "added_share": round(share.mean, 5),
        "added_share_95": [round(low, 5), round(high, 5)],
        "target": {
            "at_most": MOST_THROUGHPUT_LOST,
            "verdict": share.verdict(MOST_THROUGHPUT_LOST),
        },
    }


def table_of(report: Mapping[str, Any]) -> Table:
    """Return both costs, and the processor time beside each, as a table."""
    what = "never turned on" if report["control"] else "on against off"
    table = Table(title=f"telemetry, {what}")
    for column in ("cost", "of", "is", "95 %", "target"):
        table.add_column(column)

    def row(name: str, about: Mapping[str, Any], key: str, factor: float, unit: str) -> list[str]:
        low, high = (factor * each for each in about[f"{key}_95"])
        return [name, f"{factor * about[key]:+.2f} {unit}", f"{low:+.2f} to {high:+.2f}"]

    for name, key, factor, unit, target in (
        ("latency", "added_s", 1e3, "ms", f"<= {1e3 * MOST_LATENCY_S:g} ms"),
        ("throughput", "lost_share", 1e2, "%", f"<= {1e2 * MOST_THROUGHPUT_LOST:g} %"),
    ):
        part = report[name]
        first, *figures = row(name, part, key, factor, unit)
        verdict = part["target"]["verdict"]
        table.add_row(first, report["model"], *figures, f"{target}: {verdict}")
        cpu = part["cpu_s"]
        for key, factor, unit in (("added", 1e3, "ms"), ("share_of_all", 1e2, "%")):
            first, *figures = row("processor time", cpu, key, factor, unit)
            table.add_row(first, report["model"], *figures, "")
    if (part := report.get("of_model")) is not None:  # on a card the model itself is measured
        first, *figures = row("processor time", part, "added_share", 1e2, "%")
        table.add_row(first, part["model"], *figures, f"{target}: {part['target']['verdict']}")
    return table
