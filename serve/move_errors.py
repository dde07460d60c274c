"""What Pipeline and denoisers tell each other of pictures that move; callers never see these."""

from __future__ import annotations

from serve.errors import KelvinError, StageUnavailable


class ReplicaLeaving(StageUnavailable):
    """A replica is asked to go and hands its work over, which goes on elsewhere."""


class CheckpointRefused(KelvinError):
    """A checkpoint does not fit its job or this version; the picture starts from its first step."""

    code = "checkpoint_refused"
