"""One board a pool in each process: what its routers and its Pipeline know of the replicas.

The Pipeline hears of replicas on the streams that it reads; the router, which decides, is made by
Ray Serve, in a thread of its own, of a class that is copied by value. Both find the board here, in
a module that is imported like any other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.learnt_speeds import behind_peers, usual_step_s
from cluster.load_board import LoadBoard
from cluster.pool_state import ReplicaState
from cluster.routing import ReplicaLoad, RoutedWork, RoutingSettings
from cluster.routing_weights import staleness
from cluster.waiting_outside import WaitingOutside
from cluster.work_keys import lora_key, size_key
from cluster.work_sizes import WorkSizes

_READING_STALE_S = 10.0
# As long as an engine counts its forwards as recent (`deployments.engine_load`).
_SPEED_STALE_S = 15.0
# An estimate: a file of rank 16, some 100 MB, read, laid out and copied. A wrong one costs little,
# for a replica with less to do wins by more.
_LORA_FETCHED_S = 0.5
_BETWEEN_LOOKS_S = 1.0


class PoolBoard:
    """What this process knows of one pool.

    Args:
        settings: How replicas are weighed.
        clock: Seconds, never going back.
    """

    def __init__(
        self, settings: RoutingSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.loads = LoadBoard(settings)
        self._joined_share = settings.joined_share
        self._guard = threading.Lock()
        # Who is told to be gone in one thread must not be reported as there by another meanwhile:
        # nobody would take it out again.
        self._membership = threading.Lock()
        self.outside = WaitingOutside()
        self.sizes = WorkSizes()
        self.clock = clock
        self.has_heard = False  # of any replica's load
        self.has_replicas_told = False  # which replicas there are is known
        self._seen: frozenset[str] = frozenset()
        self._steps_s: dict[str, float] = {}
        self.usual_step_s: float | None = None  # cool seconds of the usual step on these cards
        self._slow: dict[str, tuple[float, ReplicaLoad]] = {}  # when it told so
        # When a replica told so, and cool seconds that it holds of this process and of others.
        self._shared: dict[str, tuple[float, float, float]] = {}
        self._looked_at = float("-inf")

    def heard(self, state: ReplicaState) -> None:
        """Take what a replica just told of itself, unless it is on its way out."""
        with self._membership:
            if not self.has_replicas_told or state.id in self._seen:
                self._heard(state)

    def _heard(self, state: ReplicaState) -> None:
        if state.step_s is not None and self._steps_s.get(state.id) != state.step_s:
            with self._guard:
                self._steps_s[state.id] = state.step_s
                self.usual_step_s = usual_step_s(list(self._steps_s.values()))
        age = state.reading_age_s
        is_fresh = age is not None and age <= _READING_STALE_S
        load = ReplicaLoad(
            id=state.id,
            backlog_s=state.backlog_s,
            # Faster than cool there is not: such a baseline was measured on a busy machine, and
            # believed it would draw all work to whoever was measured. Nor is who is slower than its
            # peers as fast as it says: its baseline was measured on a warm card.
            speed=min(state.speed, 1.0) / self._behind(state.step_s),
            margin_c=state.margin_c if is_fresh else None,
            throttled=state.throttled and is_fresh,
            age_s=0.0,
            holds=state.holds,
        )
        now = self.clock()
        self.loads.report(load, now)
        self.has_heard = True
        own = min(self.loads.in_flight(state.id) / state.requests, 1.0) if state.requests else 1.0
        with self._guard:
            self._shared[state.id] = (now, own * state.backlog_s, (1 - own) * state.backlog_s)
            self._slow.pop(state.id, None)
            if load.speed < 1 or load.throttled:
                self._slow[state.id] = (now, load)

    def shared_s(self, now: float) -> tuple[float, float]:
        """Return cool seconds that replicas hold of this process, and of others.

        As they told where they hold requests of this process; after some seconds without news that
        says less and less.
        """
        with self._guard:
            told = list(self._shared.values())
        ages = np.array([now - at for at, _, _ in told])
        known = 1.0 - staleness(ages, RoutingSettings().stale_after_s)
        own = float((known * np.array([each for _, each, _ in told])).sum())
        return own, float((known * np.array([each for _, _, each in told])).sum())

    def _behind(self, step_s: float | None) -> float:
        if step_s is None or self.usual_step_s is None:
            return 1.0
        return float(behind_peers(np.array([step_s]), self.usual_step_s)[0])

    def forget_old_speeds(self) -> None:
        """Take who was slow and has told nothing since for as fast as others, to find out."""
        now = self.clock()
        if now < self._looked_at + _BETWEEN_LOOKS_S:
            return
        self._looked_at = now
        with self._guard:
            old = {
                name: (at, load)
                for name, (at, load) in self._slow.items()
                if now - at > _SPEED_STALE_S
            }
            for name in old:
                del self._slow[name]
        with self._membership:
            for at, load in old.values():
                if load.id in self._seen:
                    told = replace(load, speed=1.0, throttled=False, age_s=now - at)
                    self.loads.report(told, now)

    def keep(self, ids: Sequence[str]) -> None:
        """Have exactly these replicas; who is new is taken to be idle until it tells."""
        now = self.clock()
        with self._membership:
            self.loads.keep(ids)
            for name in ids:
                if name not in self._seen:
                    self.loads.report(ReplicaLoad(id=name, backlog_s=0.0, age_s=0.0), now)
            if ids:
                self.outside.replica_came()
            elif self._seen:
                self.outside.replicas_went(now)
            self._seen = frozenset(ids)
        with self._guard:
            self._shared = {name: self._shared[name] for name in ids if name in self._shared}
        if ids:  # of a pool that is empty for now, its speed stays known
            with self._guard:
                kept = {name: self._steps_s[name] for name in ids if name in self._steps_s}
                self._steps_s = kept
        self.has_replicas_told = True

    def work(self, job: Any) -> RoutedWork:
        """Return a picture's work on this pool, as far as it is known.

        Args:
            job: A `DenoiseJob`; of anything else nothing is known.
        """
        try:
            cool_s = self.sizes.cool_s(kind_of(job), job.steps_left)
            wants = {lora_key(use.name): _LORA_FETCHED_S for use in job.loras}
        except AttributeError:
            return RoutedWork()
        if cool_s is None:
            return RoutedWork(wants=wants)
        joins = {size_key(job.width, job.height): self._joined_share * cool_s}
        return RoutedWork(cool_s=cool_s, wants=wants, joins=joins)


def kind_of(job: Any) -> Hashable:
    """Return what the cost of a `DenoiseJob`'s steps depends on."""
    tokens = job.positive.prompt_embeds.shape[0]
    return job.width, job.height, tokens, job.negative is not None and job.guidance_scale > 1


_guard = threading.Lock()
_boards: dict[str, PoolBoard] = {}


def board_of(pool: str, pipelines: int = 1) -> PoolBoard:
    """Return this process's board of a pool; whoever asks first makes it.

    Args:
        pool: Its name.
        pipelines: Processes that send work to the pool. One alone knows all that was sent; the more
            there are, the less each knows, and the more is left to chance.
    """
    with _guard:
        if pool not in _boards:
            usual = RoutingSettings()
            others = 1 - 1 / max(pipelines, 1)
            _boards[pool] = PoolBoard(replace(usual, blur=usual.blur * others))
        return _boards[pool]
