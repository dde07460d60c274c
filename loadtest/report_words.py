"""What a load test's report says first: its main figures, and what a reader must know of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.lateness import MOST_P99_MS
from loadtest.load_figures import shows_what_was_asked


@dataclass(frozen=True)
class Tile:
    """One figure: its name, value and unit, a line of words, and `good`, `bad` or nothing."""

    name: str
    value: str
    unit: str
    words: str
    mood: str = ""


def tiles(report: Mapping[str, Any]) -> list[Tile]:
    """Return the main figures."""
    figures = report["figures"]
    requests, slo, late = figures["requests"], figures["slo"], figures["lateness"]
    latency, energy = figures["latency_s"], figures["energy"]
    failed = requests["failed"] + requests["unheard"]
    joules = energy["joules_per_image"]
    shown = [
        Tile("Due", f"{figures['arrival_rate']:.3g}", "requests/s", f"{requests['due']} in all"),
        Tile(
            "Pictures",
            f"{figures['completion_rate']:.3g}",
            "images/s",
            f"{requests['right']} in all; the last came {figures['drained_after_s']:.3g} s "
            "after the run's end",
        ),
        Tile(
            "Latency p50",
            f"{latency['p50']:.3g}" if latency else "none",
            "s" if latency else "",
            f"p95 {latency['p95']:.3g} s, p99 {latency['p99']:.3g} s" if latency else "",
        ),
        Tile(
            "SLO attainment",
            f"{100 * slo['attainment']:.1f}",
            "%",
            f"within {slo['seconds']:.3g} s: {report['run']['slo_words']}",
        ),
        Tile("Goodput", f"{slo['goodput']:.3g}", "images/s", "right pictures, in time"),
        Tile(
            "Without a picture",
            str(failed),
            "",
            f"{requests['shed']} of them told to come later or past their deadline; "
            f"{requests['wrong_pictures']} wrong pictures"
            if failed
            else "every picture came, of the right size, and as the store has it",
            "bad" if failed > requests["shed"] else "good" if not failed else "",
        ),
        Tile(
            "Energy",
            "not read" if joules is None else f"{joules:.4g}",
            "" if joules is None else "J/image",
            energy.get("why", "of denoising, by the cards' counters"),
        ),
        Tile(
            "Generator's lateness",
            f"{late.get('p99_ms', 0):.3g}",
            "ms at p99",
            f"this run; to be trusted up to {MOST_P99_MS:g} ms",
            "bad" if late["is_bottleneck"] else "good",
        ),
    ]
    adherence = figures.get("adherence") or {}
    if adherence.get("judged"):
        shown.append(
            Tile(
                "Shows what was asked",
                f"{100 * adherence['share']:.0f}",
                "%",
                f"{adherence['right']} of {adherence['judged']} pictures looked at by the checker",
            )
        )
    return shown


def findings(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know before any figure is taken for the service's."""
    figures, generator = report["figures"], report["generator"]
    found = list(report["run"]["notes"])
    late = figures["lateness"]
    if late["is_bottleneck"]:
        found.append(
            f"The generator was the bottleneck: it sent requests up to {late['most_ms']:g} ms "
            f"after they were due, {late['p99_ms']:g} ms at p99 where {MOST_P99_MS:g} is the most. "
            "The latencies here hold its lag: run it on a machine of its own, or at a lower rate."
        )
    if generator["is_bottleneck"]:
        found.append(
            f"On this machine the generator is {generator['p99_ms']:g} ms late at p99 at "
            f"{generator['rate']:g} requests a second against a server that answers at once: it "
            "is not to be trusted at such rates here."
        )
    if problem := figures.get("status_problem"):
        found.append(f"Of replicas, waiting work and cards not all is known: {problem}")
    if wrong := figures["requests"]["wrong_pictures"]:
        found.append(f"{wrong} answers were not the picture that was asked for or promised.")
    if not shows_what_was_asked(figures):
        adherence = figures["adherence"]
        found.append(
            f"Only {adherence['right']} of {adherence['judged']} pictures that were looked at show "
            "what their prompts state."
        )
    if unheard := figures["requests"]["unheard"]:
        found.append(f"Of {unheard} requests nothing was heard before the run was ended.")
    return found


def card_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of cards and energy."""
    cards, energy = figures["cards"], figures["energy"]
    if "why" in cards:
        rows = [["readings", cards["why"]]]
    else:
        rows = [
            [words, f"{cards[name]['least']:g} to {cards[name]['most']:g} {unit}"]
            for name, words, unit in (
                ("temperature_c", "temperature", "°C"),
                ("power_w", "power", "W"),
            )
            if name in cards
        ]
    joules = energy["joules_per_image"]
    rows.append(["joules per image", energy["why"] if joules is None else f"{joules:g}"])
    return rows
