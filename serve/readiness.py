"""What the service says of itself: every replica's status, and whether it can take work."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from serve.errors import KelvinError
from serve.stages import Stages, typed_error
from serve.storage import ObjectStore

_ANSWER_WITHIN_S = 5.0


class Readiness:
    """Asks the stages and the store."""

    def __init__(self, stages: Stages, store: ObjectStore) -> None:
        self._stages = stages
        self._store = store

    async def replicas(self) -> dict[str, list[dict[str, Any]]]:
        """Return stage -> the status of each of its replicas; none for a stage that is down."""
        names = list(self._stages.handles)
        found = await asyncio.gather(*(self._replicas(name) for name in names))
        return {
            name: [] if isinstance(answer, KelvinError) else answer
            for name, answer in zip(names, found, strict=True)
        }

    async def check(self) -> dict[str, Any]:
        """Return `{"ready": bool, "checks": [{"name", "ok", "detail"}, ...]}`."""
        names = list(self._stages.handles)
        *stages, store = await asyncio.gather(
            *(self._replicas(name) for name in names), self._store_answers()
        )
        checks = [
            _check(name, answer, f"{len(answer)} replicas")
            if isinstance(answer, list)
            else _check(name, answer, "")
            for name, answer in zip(names, stages, strict=True)
        ]
        checks.append(_check("store", store, "answers"))
        return {"ready": all(check["ok"] for check in checks), "checks": checks}

    async def _replicas(self, stage: str) -> list[dict[str, Any]] | KelvinError:
        try:
            answers: list[dict[str, Any]] = (
                await self._stages.handles[stage]
                .broadcast("status")
                .results_async(timeout_s=_ANSWER_WITHIN_S)
            )
        except Exception as error:
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


def _check(name: str, failure: object, detail: str) -> dict[str, Any]:
    if isinstance(failure, KelvinError):
        return {"name": name, "ok": False, "detail": failure.message}
    return {"name": name, "ok": True, "detail": detail}
