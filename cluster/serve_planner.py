"""Where the pools of an application meet in Serve's controller, so that they are planned jointly.

A deployment's policy sees its own deployment only, and each policy's module is copied into the
controller by value: what they share must live in a module that the controller imports, which is
this one. The plan is made twice a second, whoever asks and however often: statistics come once a
second, and Serve asks ten times a second for each pool.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from cluster.autoscaling import Plan, PlanMemory, PlanSettings, PoolDecision, plan
from cluster.autoscaling_news import NewsWriter
from cluster.complaints import Complaints
from cluster.pool_gauges import PoolGauges
from cluster.pool_state import PoolState
from cluster.serve_states import Context, PoolFacts, PoolWatch

_PERIOD_S = 0.5
_FORGOTTEN_S = 10.0  # after which a pool that no longer asks is planned no more
_NEWS_S = 1.0
_CHANGES_KEPT = 10
_STAYS = "the plan failed; replicas stay as they are"

# Below Serve's own logger, for its handlers. Scaling is told even where Serve tells warnings
# only: it happens a few times an hour, and somebody will ask why.
_log = logging.getLogger("ray.serve.kelvin")
_log.setLevel(logging.INFO)


class Planner:
    """Plans the pools of one application. Nothing here raises or waits.

    Args:
        application: Its name.
        settings: Of the plan.
        put_news: Takes snapshots of what was decided; a thread of its own if None.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        application: str,
        settings: PlanSettings,
        put_news: Callable[[Mapping[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._put_news = put_news or NewsWriter(application, also=PoolGauges().show).put
        self._clock = clock
        self._guard = threading.RLock()
        self._watches: dict[str, PoolWatch] = {}
        self._states: dict[str, tuple[float, PoolState]] = {}
        self._memory = PlanMemory()
        self._planned_at = float("-inf")
        self._told_at = float("-inf")
        self._complaints = Complaints(_log, clock)
        self._decisions: dict[str, PoolDecision] = {}
        self._changes: list[dict[str, Any]] = []
        self._warnings: tuple[str, ...] = ()

    def targets(self, asked: Sequence[tuple[Context, PoolFacts]]) -> list[int]:
        """Return how many replicas pools should have; what they have where that cannot be told.

        Args:
            asked: Some or all of the application's pools.
        """
        try:
            with self._guard:
                for context, facts in asked:
                    self._see(context, facts)
                self._plan_if_due()
                return [self._decided(context, facts) for context, facts in asked]
        except Exception as error:
            self._complaints.about(error, _STAYS)
            return [context.target_num_replicas for context, _ in asked]

    def _decided(self, context: Context, facts: PoolFacts) -> int:
        decision = self._decisions.get(facts.name)
        return context.target_num_replicas if decision is None else decision.after

    def _see(self, context: Context, facts: PoolFacts) -> None:
        now = self._clock()
        watch = self._watches.get(facts.name)
        if watch is None or watch.facts != facts:
            watch = self._watches[facts.name] = PoolWatch(facts)
        seen = self._states.get(facts.name)
        changed = seen is not None and not _is_as_before(seen[1], context)
        if seen is not None and now < seen[0] + _PERIOD_S and not changed:
            return
        if changed:
            # What was decided before is about another state.
            self._planned_at = float("-inf")
        decision = self._decisions.get(facts.name)
        target = context.target_num_replicas
        if decision is not None and target not in (decision.before, decision.after):
            words = (
                "by Ray Serve itself, for requests that wait for a pool without replicas"
                if decision.after == 0
                else "not by the plan: by Ray Serve's bounds or a new deployment"
            )
            reason = f"{facts.name} {decision.after} -> {target}: {words}"
            self._note_change(facts.name, decision.after, target, reason)
            self._decisions[facts.name] = replace(decision, before=target, after=target)
        self._states[facts.name] = (now, watch.state(context, now))

    def _plan_if_due(self) -> None:
        now = self._clock()
        if now < self._planned_at + _PERIOD_S:
            return
        self._planned_at = now
        self._states = {
            name: seen for name, seen in self._states.items() if now - seen[0] < _FORGOTTEN_S
        }
        pools = [state for _, state in self._states.values()]
        made, self._memory = plan(pools, self._memory, now, self.settings)
        if made.error is not None:
            self._complaints.about(made.error, _STAYS)
        self._tell(made, now)
        self._decisions = {decision.pool: decision for decision in made.decisions}

    def _tell(self, made: Plan, now: float) -> None:
        for decision in made.decisions:
            before = self._decisions.get(decision.pool)
            if decision.after == decision.before:
                continue
            if before is None or before.after != decision.after:
                self._note_change(decision.pool, decision.before, decision.after, decision.reason)
        for warning in made.warnings:
            if warning not in self._warnings:
                _log.warning(warning)
        if made.warnings != self._warnings or now >= self._told_at + _NEWS_S:
            self._warnings = made.warnings
            self._told_at = now
            self._put_news(self._snapshot(made))

    def _note_change(self, pool: str, before: int, after: int, reason: str) -> None:
        _log.info(reason)
        change = {"pool": pool, "before": before, "after": after, "reason": reason}
        self._changes.append(change | {"at": time.time()})
        del self._changes[:-_CHANGES_KEPT]
        self._told_at = float("-inf")  # tell it at once

    def _snapshot(self, made: Plan) -> dict[str, Any]:
        at = time.time()
        pools = {}
        for decision in made.decisions:
            shown = asdict(decision)
            del shown["pool"]
            _, state = self._states[decision.pool]
            pools[decision.pool] = {
                "replicas": len(state.replicas),
                "target": decision.after,
                "at": at,
                **shown,
                "derated": [
                    {"replica": replica, "factor": factor, "why": why}
                    for replica, factor, why in decision.derated
                ],
            }
        return {
            "at": at,
            "pools": pools,
            "changes": list(self._changes),
            "warnings": list(self._warnings),
        }


_planners: dict[str, Planner] = {}


def planner_of(application: str, settings: Mapping[str, Any]) -> Planner:
    """Return the one planner of an application in this process; a new one for new settings.

    Args:
        application: Its name.
        settings: Fields of `PlanSettings`; unknown ones are passed over, for a controller may be of
            another version than who deploys.
    """
    known = {each.name for each in fields(PlanSettings)}
    wanted = PlanSettings(**{name: value for name, value in settings.items() if name in known})
    found = _planners.get(application)
    if found is None or found.settings != wanted:
        found = _planners[application] = Planner(application, wanted)
    return found


def _is_as_before(state: PoolState, context: Context) -> bool:
    return state.target == context.target_num_replicas and len(state.replicas) == len(
        context.running_replicas
    )
