"""What the shipped dashboard and alert rules ask Prometheus for, read as Prometheus reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

FOLDER = Path(__file__).parents[1] / "cluster" / "monitoring"


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> Iterator[str]:
    """Yield every expression, with Grafana's variables filled in."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$application", ".*")
    for rule in rules():
        yield rule["expr"]


def metric_names() -> set[str]:
    """Return the names of all metrics asked for; fail on what is no PromQL."""
    names: set[str] = set()

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector) and node.name is not None:
            names.add(node.name)
        return True

    for query in queries():
        promql_parser.walk(promql_parser.parse(query), visit)
    return names
