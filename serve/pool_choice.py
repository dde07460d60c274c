"""Which pool of a stage takes a piece of work, and what this process learns of pools on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from random import Random
from typing import Any

from cluster.card_kinds import card_kind
from cluster.learnt_speeds import KindSpeed, learnt_speeds
from cluster.plan_settings import PlanSettings
from cluster.pool_state import ReplicaState, Stage
from cluster.process_boards import PoolBoard, board_of, kind_of
from cluster.routing import PoolLoad, RoutedWork, RoutingSettings, choose_pool
from cluster.work_sizes import Asked, asked_steps
from deployments.payloads import DenoiseJob, Latents
from serve.config import PoolSettings, Settings

_LATE_START = PlanSettings().late_start


class PoolChoice:
    """Chooses by `cluster.routing.choose_pool`; with `power_of_two` by size alone, at random.

    Args:
        settings: All of them.
    """

    def __init__(self, settings: Settings) -> None:
        self._pools = settings.pools
        self._by_load = settings.routing.policy == "kelvin"
        self._settings = RoutingSettings()
        self._boards = {
            pool.name: board_of(pool.name, settings.pipeline.num_replicas)
            for pools in settings.pools.values()
            for pool in pools
        }
        self._random = Random()

    @contextmanager
    def sending(self, stage: Stage, payload: Any, job: DenoiseJob | None = None) -> Iterator[str]:
        """Choose a pool, whose name is yielded, for a call that lasts as long as the context.

        Args:
            stage: Whose pools.
            payload: The first argument of the call, the object itself.
            job: What is to be done there, where that is known.
        """
        pool = self.pool(stage, job)
        if len(self._pools[stage]) == 1:
            yield pool
            return
        board = self._boards[pool]
        speeds = self._speeds(stage)
        own = self._own_work(pool, self._in_general(self._pools[stage], job, speeds), job, speeds)
        cool_s = own.cool_s or self._settings.usual_s / speeds[pool]
        board.outside.came(id(payload), cool_s, board.clock())
        try:
            yield pool
        finally:
            board.outside.went(id(payload))

    def is_vain(self, pool: str, waited_s: float = 0.0) -> bool:
        """Whether what has waited so long at a pool without replicas is better sent anew.

        So it is while another pool of the stage has replicas, and this one's were lost after it was
        sent there, or have not come for far too long. Serve's router tells nobody of calls that it
        takes back from a dead replica, and keeps them until the pool has another one.
        """
        board = self._boards[pool]
        if len(board.loads):
            return False
        now = board.clock()
        for pools in self._pools.values():
            own = next((each for each in pools if each.name == pool), None)
            if own is not None:
                late_s = _LATE_START * own.start_s
                is_vain = max(
                    waited_s, board.outside.waited_s(now)
                ) > late_s or board.outside.has_lost(since=now - waited_s)
                others = (each for each in pools if each is not own)
                return is_vain and any(
                    len(self._boards[each.name].loads) or self._is_unheard_of(each)
                    for each in others
                )
        return False

    def _is_unheard_of(self, pool: PoolSettings) -> bool:
        """Whether a pool has replicas by the settings, and nobody has said here which.

        So it is with one whose handle has not been used yet.
        """
        return bool(pool.num_replicas) and not self._boards[pool.name].has_replicas_told

    def is_asleep(self, stage: Stage) -> bool:
        """Whether a stage may be without replicas, and none is known here."""
        return all(
            pool.min_replicas == 0 and not len(self._boards[pool.name].loads)
            for pool in self._pools[stage]
        )

    def pool(self, stage: Stage, job: DenoiseJob | None = None) -> str:
        """Return the name of the pool where the work is done first.

        Args:
            stage: Whose pools.
            job: What is to be done there, where that is known.
        """
        pools = self._pools[stage]
        if len(pools) == 1:
            return pools[0].name
        # However slow the others are: what has waited in vain must not be sent there again.
        pools = tuple(pool for pool in pools if not self.is_vain(pool.name)) or pools
        if not self._by_load:
            sizes = [max(pool.num_replicas, 0.01) * estimated_speed(pool) for pool in pools]
            return self._random.choices(pools, sizes)[0].name
        speeds = self._speeds(stage)
        work = self._in_general(pools, job, speeds)
        loads = [
            self._load(pool, self._own_work(pool.name, work, job, speeds), speeds[pool.name])
            for pool in pools
        ]
        return choose_pool(loads, work, self._random, self._settings)

    def estimated_s(self, job: DenoiseJob) -> float:
        """Return about how many cool seconds of an H100 denoising takes."""
        pools = self._pools["denoise"]
        known = self._in_general(pools, job, self._speeds("denoise")).cool_s
        return self._settings.usual_s if known is None else known

    def heard(self, pool: str, load: ReplicaState | None) -> None:
        """Take what one of a pool's replicas told of itself."""
        if load is not None:
            self._boards[pool].heard(load)

    def learnt(self, pool: str, job: DenoiseJob, latents: Latents) -> None:
        """Take what a picture cost there."""
        if latents.cool_s is not None:
            sizes = self._boards[pool].sizes
            sizes.learn(kind_of(job), job.steps_left, latents.cool_s)
            rows = 2 if job.negative is not None and job.guidance_scale > 1 else 1
            asked = asked_steps(job.width, job.height, rows)
            sizes.learn(asked, job.steps_left, latents.cool_s)

    def took(self, pool: str, kind: Asked, seconds: float) -> None:
        """Take what a call cost there; what came from a cache says nothing."""
        self._boards[pool].sizes.learn(kind, 1, seconds)

    def _load(self, pool: PoolSettings, own: RoutedWork, speed: float) -> PoolLoad:
        board = self._boards[pool.name]
        now = board.clock()
        soonest = board.loads.soonest(own, now)
        if soonest is None and self._is_unheard_of(pool):
            soonest = own.cool_s or self._settings.usual_s / speed
        return PoolLoad(
            name=pool.name,
            soonest_s=soonest,
            kind_speed=speed,
            queued_s=board.outside.cool_s,
            speed=board.loads.speed,
            start_s=pool.start_s,
            waited_s=board.outside.waited_s(now),
        )

    def _own_work(
        self, pool: str, work: RoutedWork, job: DenoiseJob | None, speeds: Mapping[str, float]
    ) -> RoutedWork:
        """Return a job's work on one pool, from that on an H100 where the pool has seen none."""
        own = self._boards[pool].work(job)
        if own.cool_s is None and work.cool_s is not None:
            return RoutedWork(cool_s=work.cool_s / speeds[pool])
        return own

    def _in_general(
        self, pools: tuple[PoolSettings, ...], job: DenoiseJob | None, speeds: Mapping[str, float]
    ) -> RoutedWork:
        """Return a job's work in cool seconds of an H100, from the first pool that knows."""
        for pool in pools:
            own = self._boards[pool.name].work(job)
            if own.cool_s is not None:
                return RoutedWork(cool_s=own.cool_s * speeds[pool.name])
        return RoutedWork()

    def _speeds(self, stage: Stage) -> dict[str, float]:
        return speeds_of(self._pools[stage], self._boards)


def speeds_of(pools: tuple[PoolSettings, ...], boards: Mapping[str, PoolBoard]) -> dict[str, float]:
    """Return the speeds of a stage's pools, as measured where they were estimates."""
    return learnt_speeds(
        {
            pool.name: KindSpeed(
                estimated_speed(pool), pool.kind_speed is None, boards[pool.name].usual_step_s
            )
            for pool in pools
        }
    )


def kind_of_card(pool: PoolSettings) -> str:
    """Return the kind of card of a pool, as Ray calls it; `GPU` where the settings do not say."""
    return pool.accelerator_type or ("GPU" if pool.num_gpus else "CPU")


def estimated_speed(pool: PoolSettings) -> float:
    """Return the speed of a pool's cool card, an H100 being 1: as set, or else an estimate."""
    return pool.kind_speed or card_kind(kind_of_card(pool)).speed
