"""What a failure of a stage means: to the caller, and to the replica that it happened in.

What crosses a process boundary comes back wrapped by Ray; here it is unwrapped.
"""

from __future__ import annotations

import asyncio
import re

from ray import exceptions as ray_exceptions
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from serve.errors import KelvinError, Overloaded, StageFailed, StageUnavailable

_PATH = re.compile(r"(?<![\w:/.])(?:~|\.{1,2})?(?:/[\w.@+~-]+){2,}/?")


def typed_error(error: BaseException, stage: str) -> KelvinError:
    """Return what a failure of a stage means to the caller.

    Args:
        error: What awaiting a handle raised.
        stage: Named in the message.
    """
    while isinstance(error, ray_exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, KelvinError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded(
            f"Too much work is waiting for stage {stage!r}: {error.message}",
            allowed="try again later; Retry-After says when",
        )
    if isinstance(
        error,
        ray_exceptions.RayActorError
        | ray_exceptions.RaySystemError
        | ray_exceptions.ObjectLostError
        | ray_exceptions.TaskCancelledError
        | ray_exceptions.WorkerCrashedError
        # Ray's handles turn TaskCancelledError into this; who cancels a job here never gets here.
        | asyncio.CancelledError
        | DeploymentUnavailableError
        | ReplicaUnavailableError,
    ):
        return StageUnavailable(
            f"Stage {stage!r} lost the replica that worked on this: {type(error).__name__}."
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # Whatever it is, callers are to learn what failed and not where the server keeps its files.
    told = _PATH.sub("(a path)", first_line)
    return StageFailed(f"Stage {stage!r} failed: {type(error).__name__}: {told}")


def is_crash(error: BaseException) -> bool:
    """Return whether a replica's process died by itself, neither asked to nor with its node."""
    # Ray tells why an actor died in words only. NODE_OUT_OF_MEMORY is a choice of Ray's, which
    # takes the process that it thinks will be missed least.
    return (
        isinstance(error, ray_exceptions.ActorDiedError)
        # Else the replica lives, and tells of another actor's death.
        and not isinstance(error, ray_exceptions.RayTaskError)
        and not error.preempted
        and "SYSTEM_ERROR" in str(error)
    )
