"""What ships to start a cluster with, read as its tests need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serve.config import Settings

CLUSTER = Path(__file__).parents[1] / "cluster"
KUBERAY = CLUSTER / "kuberay"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def ray_service() -> dict[str, Any]:
    (service,) = documents(KUBERAY / "rayservice.yaml")
    return service


def serve_configs() -> dict[str, dict[str, Any]]:
    return {
        "serve-autoscaling.yaml": documents(CLUSTER / "serve-autoscaling.yaml")[0],
        "aws-serve.yaml": documents(CLUSTER / "aws-serve.yaml")[0],
        "kuberay/rayservice.yaml": yaml.safe_load(ray_service()["spec"]["serveConfigV2"]),
    }


def most_cards(application: dict[str, Any]) -> dict[str, float]:
    """Return kind of card -> how many of it an application may ask for, while it is redeployed."""
    cards: dict[str, float] = {}
    for pools in Settings.model_validate(application["args"]).pools.values():
        for pool in pools:
            kind = str(pool.accelerator_type)
            most = pool.most_replicas + pool.surge_replicas
            cards[kind] = cards.get(kind, 0.0) + pool.num_gpus * most
    return cards


def labels_asked_for(application: dict[str, Any]) -> list[set[tuple[str, str]]]:
    """Return what a node must have, of the Pipeline and of each pool that says so."""
    settings = Settings.model_validate(application["args"])
    pools = [pool for those in settings.pools.values() for pool in those]
    selectors = [settings.pipeline.label_selector, *(pool.label_selector for pool in pools)]
    return [set(selector.items()) for selector in selectors if selector]


def node_groups() -> list[dict[str, Any]]:
    """Return the groups of the RayService, the head's first."""
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
