"""What one card was measured to take for each stage of a picture: shipped as data, read once.

The figures are copies of recordings in `loadtest/data`, which a test compares. What lies between
two measured sizes, or outside of them, is an estimate and says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parent / "data" / "measured_speeds.json"
_PIXELS_A_TOKEN = 16 * 16

# Turbo is Large's architecture with other weights: its steps cost the same.
STEPS_OF = {"large": "large", "large-turbo": "large", "medium": "medium"}


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of work on the measured card.

    Attributes:
        seconds: Of one step, of decoding one picture, or of encoding one request.
        source: The command that measured it, or what it was reckoned from.
        is_estimate: It was not measured for exactly this by a command that is kept.
    """

    seconds: float
    source: str
    is_estimate: bool


def step_cost(model: str, width: int, height: int, *, guided: bool) -> Cost:
    """Return what one denoising step of one picture takes, nothing sharing its forward.

    Between measured sizes a straight line over tokens; beyond them the square of the tokens, as
    attention alone would grow; below the smallest no less than it, since launches bind there.

    Args:
        model: A key of `STEPS_OF`.
        width: Pixels.
        height: Pixels.
        guided: Two rows a step instead of one.
    """
    recorded = _data()["models"][STEPS_OF[model]]
    text_tokens, rows = recorded["text_tokens"], 2 if guided else 1
    curve = sorted(
        (_tokens(entry["width"], entry["height"]) + text_tokens, entry["ms"] / 1e3)
        for entry in recorded["steps"]
        if entry["rows"] == rows
    )
    tokens = _tokens(width, height) + text_tokens
    source = str(recorded["source"])
    for at, seconds in curve:
        if at == tokens:
            return Cost(seconds, source, False)
    (least, first), (most, last) = curve[0], curve[-1]
    if tokens < least:
        return Cost(first, f"no faster than the smallest size measured; {source}", True)
    if tokens > most:
        grown = last * (tokens / most) ** 2
        return Cost(grown, f"the largest size measured, by tokens squared; {source}", True)
    (before, fast), (after, slow) = next(
        pair for pair in zip(curve, curve[1:], strict=False) if pair[0][0] < tokens < pair[1][0]
    )
    between = fast + (slow - fast) * (tokens - before) / (after - before)
    return Cost(between, f"between two sizes measured; {source}", True)


def decode_cost(width: int, height: int) -> Cost:
    """Return what decoding one picture takes; sides in pixels, by area where not measured."""
    recorded = _data()["decode"]
    measured = recorded["width"] * recorded["height"]
    seconds = recorded["ms"] / 1e3 * width * height / measured
    source = str(recorded["source"])
    if math.isclose(width * height, measured):
        return Cost(seconds, source, False)
    return Cost(seconds, f"by area; {source}", True)


def text_cost(*, guided: bool) -> Cost:
    """Return what encoding a request takes: its prompt, and with guidance the negative one."""
    recorded = _data()["text"]
    prompts = 2 if guided else 1
    return Cost(recorded["ms_a_prompt"] / 1e3 * prompts, str(recorded["source"]), True)


@dataclass(frozen=True, slots=True)
class Power:
    """Watts of one card, and where they come from."""

    busy_w: float
    idle_w: float
    source: str
    is_estimate: bool


def power_of(card: str, limit_w: float) -> Power:
    """Return what a card draws, busy and with a loaded model that idles.

    Args:
        card: Its kind.
        limit_w: Its power limit, by which a card that was never measured is told from one that was.
    """
    recorded = _data()["watts"]
    if card == _data()["card"]:
        return Power(recorded["busy"], recorded["idle"], recorded["source"], False)
    idle = limit_w * recorded["idle"] / recorded["limit"]
    source = f"its limit of {limit_w:.0f} W when busy, an H100's share of the limit when idle"
    return Power(limit_w, idle, source, True)


def measured_card() -> str:
    """Return the kind of card that all of this was measured on."""
    return str(_data()["card"])


def _tokens(width: int, height: int) -> int:
    return width * height // _PIXELS_A_TOKEN


@cache
def _data() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return read
