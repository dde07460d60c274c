"""Draws how jobs went on while things were killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loadtest.chaos_attack import Strike
from loadtest.chaos_load import Sample
from loadtest.trace_plot import Panel, draw_trace


def draw_timeline(samples: Sequence[Sample], strikes: Sequence[Strike], file: Path) -> None:
    """Draw jobs accepted and ended over time, with each strike.

    Args:
        samples: In order.
        strikes: In order.
        file: A PNG.
    """
    panels = [
        Panel(
            "jobs",
            {
                "accepted": [float(sample.accepted) for sample in samples],
                "ended": [float(sample.ended) for sample in samples],
            },
        ),
        Panel("jobs under way", {"": [float(each.accepted - each.ended) for each in samples]}),
    ]
    marks = [(strike.at_s, strike.kind) for strike in strikes]
    draw_trace([sample.at_s for sample in samples], panels, [(0.0, "")], marks).save(file)
