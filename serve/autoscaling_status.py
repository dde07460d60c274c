"""What `/v1/status` says of autoscaling: each pool's replicas, target and the reason in words."""

from __future__ import annotations

from typing import Any

from cluster.autoscaling_news import read_news
from serve.config import Settings

_FIXED = "the number of replicas is fixed: min_replicas and max_replicas are not set"
_SERVES_OWN = "Ray Serve's own policy decides, by requests, and tells no reasons"


def shown_autoscaling(application: str, settings: Settings) -> dict[str, Any]:
    """Return the newest decisions; it may wait for Ray: not for an event loop.

    Args:
        application: Name of this one.
        settings: All of them; pools that they do not name are not shown.
    """
    policy = settings.autoscaling.policy
    scaled = [pool for pools in settings.pools.values() for pool in pools if pool.is_autoscaled]
    shown: dict[str, Any] = {
        "policy": policy,
        "pools": {
            pool.name: {"reason": _SERVES_OWN if pool.is_autoscaled else _FIXED}
            for pools in settings.pools.values()
            for pool in pools
        },
        "changes": [],
        "warnings": [],
    }
    if policy != "kelvin" or not scaled:
        return shown
    news = read_news(application)
    if news is None:
        return shown | {"warnings": ["nothing was decided yet, or it cannot be read"]}
    known = news.get("pools", {})
    shown["pools"] |= {pool.name: known[pool.name] for pool in scaled if pool.name in known}
    names = {pool.name for pool in scaled}
    shown["changes"] = [each for each in news.get("changes", []) if each.get("pool") in names]
    shown["warnings"] = news.get("warnings", [])
    shown["at"] = news.get("at")  # by the controller's clock
    return shown
