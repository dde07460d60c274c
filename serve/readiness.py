"""What the service says of itself: every replica's status, and whether it can take work."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.errors import KelvinError
from serve.stage_errors import typed_error
from serve.stages import Stages
from serve.storage import ObjectStore

_ANSWER_WITHIN_S = 5.0

_Answer = list[dict[str, Any]] | KelvinError


class Readiness:
    """Asks the stages and the store.

    Args:
        stages: All pools of all stages.
        store: Of pictures and jobs.
        may_be_empty: Pools that start with the next request where they have no replica.
    """

    def __init__(
        self, stages: Stages, store: ObjectStore, may_be_empty: frozenset[str] = frozenset()
    ) -> None:
        self._stages = stages
        self._store = store
        self._may_be_empty = may_be_empty

    async def replicas(self) -> dict[str, list[dict[str, Any]]]:
        """Return stage -> the status of each replica of its pools; none for a pool that is down."""
        found = await self._all_replicas()
        return {
            stage: [
                replica
                for answer in pools.values()
                if isinstance(answer, list)
                for replica in answer
            ]
            for stage, pools in found.items()
        }

    async def check(self) -> dict[str, Any]:
        """Return `{"ready": bool, "checks": [{"name", "ok", "detail"}, ...]}`.

        A stage of several pools is ready as soon as one of them is.
        """
        stages, store = await asyncio.gather(self._all_replicas(), self._store_answers())
        checks = [_stage_check(stage, pools) for stage, pools in stages.items()]
        checks.append(_check("store", store, "answers"))
        return {"ready": all(check["ok"] for check in checks), "checks": checks}

    async def _all_replicas(self) -> dict[str, dict[str, _Answer]]:
        asked = [
            (stage, pool, handle)
            for stage, pools in self._stages.pools.items()
            for pool, handle in pools.items()
        ]
        answers = await asyncio.gather(
            *(self._replicas(stage, pool, handle) for stage, pool, handle in asked)
        )
        found: dict[str, dict[str, _Answer]] = {}
        for (stage, pool, _), answer in zip(asked, answers, strict=True):
            found.setdefault(stage, {})[pool] = answer
        return found

    async def _replicas(self, stage: str, pool: str, handle: DeploymentHandle) -> _Answer:
        try:
            answers: list[dict[str, Any]] = await handle.broadcast("status").results_async(
                timeout_s=_ANSWER_WITHIN_S
            )
        except Exception as error:
            if isinstance(error, DeploymentUnavailableError) and pool in self._may_be_empty:
                return []
            # Ray's, Serve's and the replica's own failures alike mean: not ready, and say why.
            return typed_error(error, stage)
        return answers

    async def _store_answers(self) -> KelvinError | None:
        try:
            # A key nobody has: the answer must come from the store, and costs it nothing.
            await asyncio.wait_for(
                self._store.exists(f"ready/{secrets.token_hex(8)}"), _ANSWER_WITHIN_S
            )
        except KelvinError as error:
            return error
        except TimeoutError:
            return KelvinError(f"The object store did not answer within {_ANSWER_WITHIN_S} s.")
        return None


def _stage_check(stage: str, pools: dict[str, _Answer]) -> dict[str, Any]:
    lists = [answer for answer in pools.values() if isinstance(answer, list)]
    if not lists:
        return _check(stage, next(iter(pools.values())), "")
    detail = f"{sum(map(len, lists))} replicas"
    failed = [
        f"{pool}: {answer.message}"
        for pool, answer in pools.items()
        if isinstance(answer, KelvinError)
    ]
    return _check(stage, None, "; ".join([detail, *failed]))


def _check(name: str, failure: object, detail: str) -> dict[str, Any]:
    if isinstance(failure, KelvinError):
        return {"name": name, "ok": False, "detail": failure.message}
    return {"name": name, "ok": True, "detail": detail}
