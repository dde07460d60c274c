"""Ray Serve's two ways of asking how many replicas there should be, both answered by the plan.

`ApplicationPolicy` is for the YAML that `serve deploy` takes: Serve asks it for all deployments at
once. `PoolPolicy` is for `serve.run`, which knows no policy of an application: each pool asks for
itself, and the pools meet in `cluster.serve_planner`. Each pool's facts are the `policy_kwargs` of
its own deployment either way, put there by `serve.app`.

Serve pickles this very module by value, so it keeps nothing. An exception from here would stop all
of Serve: everything is caught, told once a minute, and answered with the number there is.
"""

from __future__ import annotations

import logging
from typing import Any

from cluster.complaints import Complaints
from cluster.serve_planner import planner_of
from cluster.serve_states import PoolFacts

_STAYS = "no plan for a pool; its replicas stay as they are"


class PoolPolicy:
    """Asks for one deployment; Ray Serve makes it once and calls it ten times a second.

    Args:
        pool: Fields of `PoolFacts`.
        settings: Fields of `cluster.autoscaling.PlanSettings`.
    """

    def __init__(self, pool: dict[str, Any], settings: dict[str, Any]) -> None:
        self._pool = pool
        self._settings = settings
        self._complaints = Complaints(logging.getLogger("ray.serve"))

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state: the planner keeps its own."""
        try:
            planner = planner_of(context.app_name or "", self._settings)
            (wanted,) = planner.targets([(context, PoolFacts(**self._pool))])
            return wanted, {}
        except Exception as error:
            self._complaints.about(error, _STAYS)
            return context.target_num_replicas, {}


class ApplicationPolicy:
    """Asks for every autoscaled deployment of an application at once."""

    def __init__(self) -> None:
        self._complaints = Complaints(logging.getLogger("ray.serve"))

    def __call__(
        self, contexts: dict[Any, Any]
    ) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Return the number of replicas of each deployment, and no states."""
        wanted = {each: context.target_num_replicas for each, context in contexts.items()}
        try:
            asked: dict[Any, tuple[Any, PoolFacts]] = {}
            for deployment, context in contexts.items():
                told = context.config.policy.policy_kwargs
                planner = planner_of(context.app_name or "", told["settings"])
                asked[deployment] = (context, PoolFacts(**told["pool"]))
            if asked:
                wanted |= zip(asked, planner.targets(list(asked.values())), strict=True)
        except Exception as error:
            self._complaints.about(error, _STAYS)
        return wanted, {deployment: {} for deployment in contexts}
