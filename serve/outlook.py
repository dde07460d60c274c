"""What a model's stages have to do and what they can do, as this process knows it.

It reads the boards that routing keeps: replicas, their speeds, what each kind of work costs.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.completion import PoolOutlook, StageOutlook
from cluster.pool_state import Stage
from cluster.process_boards import board_of
from cluster.work_sizes import Asked
from serve.config import PoolSettings, Settings
from serve.pool_choice import speeds_of


class Outlook:
    """Of one model.

    Args:
        settings: All of them, with the pools of the model.
    """

    def __init__(self, settings: Settings) -> None:
        self._pools = settings.pools
        self._has_others = settings.pipeline.num_replicas > 1
        self._boards = {
            pool.name: board_of(pool.name, settings.pipeline.num_replicas)
            for pools in settings.pools.values()
            for pool in pools
        }

    def stage(
        self, stage: Stage, kind: Asked, size: int, pieces: int, ahead: Mapping[Asked, float]
    ) -> StageOutlook | None:
        """Return a stage as a request meets it; work is in cool seconds of an H100.

        Args:
            stage: Which.
            kind: Of the request's work.
            size: How much of that each piece is.
            pieces: How many there are.
            ahead: Work that this process has taken on before.

        Returns:
            None where nothing like it was ever done.
        """
        speeds = speeds_of(self._pools[stage], self._boards)
        unit_s = self._unit_s(stage, kind, speeds)
        if unit_s is None:
            return None
        own_s = sum(
            number * (self._unit_s(stage, each, speeds) or 0.0) for each, number in ahead.items()
        )
        pools = tuple(self._pool(pool, unit_s * size, speeds) for pool in self._pools[stage])
        return StageOutlook(pools, unit_s * size, pieces, self._with_others(stage, own_s, speeds))

    def down(self) -> tuple[Stage, float] | None:
        """Return a stage without any replica, and what one takes to start; None: there is none."""
        for stage, pools in self._pools.items():
            if not any(map(self._size, pools)):
                return stage, min(pool.start_s for pool in pools)
        return None

    def _size(self, pool: PoolSettings) -> int:
        """Return how many replicas there are; before anybody has told, as many as there should."""
        board = self._boards[pool.name]
        return len(board.loads) if board.has_replicas_told else pool.num_replicas

    def _unit_s(self, stage: Stage, kind: Asked, speeds: Mapping[str, float]) -> float | None:
        for pool in self._pools[stage]:
            seconds = self._boards[pool.name].sizes.asked_s(kind)
            if seconds is not None:
                return seconds * speeds[pool.name]
        return None

    def _pool(self, pool: PoolSettings, piece_s: float, speeds: Mapping[str, float]) -> PoolOutlook:
        speed, replicas, loads = (
            speeds[pool.name],
            self._size(pool),
            self._boards[pool.name].loads,
        )
        if not replicas:
            return PoolOutlook(pool.start_s + piece_s / speed, speed)
        share = loads.speed / len(loads) if len(loads) else 1.0
        return PoolOutlook(piece_s / (speed * share), speed * share * replicas)

    def _with_others(self, stage: Stage, own_s: float, speeds: Mapping[str, float]) -> float:
        """Add what other Pipelines have brought.

        A replica tells how much it holds. Of what waits outside of it, others are thought to have
        as many times as much as this process as they have inside.
        """
        # A text replica counts prompts, of which a call has one or two.
        if not self._has_others or stage == "text":
            return own_s
        inside = others = 0.0
        for pool in self._pools[stage]:
            board = self._boards[pool.name]
            own, foreign = board.shared_s(board.clock())
            inside += own * speeds[pool.name]
            others += foreign * speeds[pool.name]
        return max(own_s + others, own_s * (1 + others / inside) if inside > 0 else 0.0)
