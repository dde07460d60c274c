"""Recordings of step costs: one JSON file a card, one entry a model.

An entry is what `StepCosts.from_json` reads, and beside it where the figures come from: device,
torch, command, date. A new recording of a model replaces its old one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.step_costs import StepCosts
from serve.errors import ConfigurationError

RECORDED = Path(__file__).parent / "data" / "step_costs_h100.json"


def read_recording(path: Path, model: str) -> tuple[StepCosts, dict[str, Any]]:
    """Return a model's costs, and what the file says of where they come from.

    Raises:
        ConfigurationError: There is no such file, it is none, or it lacks this model.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        entry = entries[model]
        costs = StepCosts.from_json(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} holds no step costs of {model!r}: {type(error).__name__}: {error}",
            field="costs",
            value=str(path),
        ) from error
    return costs, {name: value for name, value in entry.items() if name != "costs"}


def write_recording(
    path: Path, model: str, costs: StepCosts, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Put a model's costs into the file, beside those of other models; returns the entry."""
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    entries[model] = {**told, **costs.as_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    entry: dict[str, Any] = entries[model]
    return entry
