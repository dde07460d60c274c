"""The four policies that are compared, by name, and the rivals' settings chosen for each scenario.

The settings are in `cluster/data/rival_settings.json`, written by `kelvin simulate --tune`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.simulation.cards import Cards
from cluster.simulation.control import Control, RayQueueOnly, ThresholdScaling
from cluster.simulation.kelvin import KelvinControl
from cluster.simulation.queue_only import QueueOnlySettings
from cluster.simulation.scenario import Scenario
from cluster.simulation.threshold import ThresholdSettings
from serve.errors import ConfigurationError

PolicyName = Literal["queue-only", "threshold", "kelvin-without-heat", "kelvin"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)
RIVALS: tuple[PolicyName, ...] = ("queue-only", "threshold", "kelvin-without-heat")
CHOSEN = Path(__file__).parents[1] / "data" / "rival_settings.json"

RivalSettings = QueueOnlySettings | ThresholdSettings


@dataclass(frozen=True)
class Policy:
    """A policy with its settings; can be sent to another process.

    Attributes:
        name: Which.
        settings: Of a rival; None takes the defaults. Kelvin has its own defaults everywhere.
    """

    name: PolicyName
    settings: RivalSettings | None = None

    def control(self, scenario: Scenario, seed: int, cards: Cards) -> Control:
        """Return the policy at work on these cards."""
        if self.name == "queue-only":
            queue = self.settings
            return RayQueueOnly(
                queue if isinstance(queue, QueueOnlySettings) else QueueOnlySettings(), seed
            )
        if self.name == "threshold":
            limits = self.settings
            return ThresholdScaling(
                limits if isinstance(limits, ThresholdSettings) else ThresholdSettings(),
                seed,
                cards,
            )
        return KelvinControl(scenario, seed, cards, heat=self.name == "kelvin")


def policy(name: str, scenario: str, path: Path = CHOSEN) -> Policy:
    """Return a policy with the settings that were chosen for a scenario, or its defaults.

    Raises:
        ConfigurationError: There is no such policy, or the chosen settings cannot be read.
    """
    known: dict[str, PolicyName] = {each: each for each in POLICIES}
    if name not in known:
        raise ConfigurationError(
            "There is no such policy.", field="policy", value=name, allowed=", ".join(POLICIES)
        )
    makers: dict[str, Callable[..., RivalSettings]] = {
        "queue-only": QueueOnlySettings,
        "threshold": ThresholdSettings,
    }
    if name not in makers or not path.exists():
        return Policy(known[name])
    try:
        chosen: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["chosen"]
        given = chosen.get(scenario, {}).get(name)
        settings = makers[name](**given["settings"]) if given else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"The rivals' settings cannot be read: {error!r}", field="settings", value=str(path)
        ) from error
    return Policy(known[name], settings)
