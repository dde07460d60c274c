"""One line of a diagnosis: what was looked at, what was found, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One finding of `kelvin doctor` or of a start-up probe."""

    name: str
    ok: bool
    detail: str
    remedy: str | None = None  # what to do; None when ok
