"""How long a replica that is asked to go may take for the calls that it still has.

Ray Serve stops a replica once its calls are done, or at the end of this time whatever they are at.
So it must be longer than all that a replica may hold takes, and is: an idle one goes at once. A job
of POST /v1/jobs is no call, and is waited for as long (`serve.departure`).

A denoiser hands its work over after the step under way. A Pipeline waits for the pictures of its
callers, and so does a denoiser whose requests do not move.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.card_kinds import H100_STEP_S
from cluster.pool_state import Stage
from serve.config import PoolSettings
from serve.models import Defaults
from serve.pool_choice import estimated_speed

# Above the longest call of text, decode and upload, and of a laptop's small models.
_LEAST_S = 120.0
_MOST_S = 3600.0
# Requests may be larger or have more steps than the model's defaults.
_TO_SPARE = 2.0
_MEASURED_PIXELS = 1024 * 1024


def graceful_shutdown_s(stage: Stage, pool: PoolSettings, defaults: Defaults) -> float:
    """Return Serve's `graceful_shutdown_timeout_s` of a pool.

    Args:
        stage: Of the pool.
        pool: Its settings.
        defaults: Of the model.
    """
    if stage != "denoise" or pool.checkpoint_every_steps:
        return _LEAST_S
    return _denoising_s(pool, defaults)


def pipeline_graceful_shutdown_s(denoisers: Sequence[PoolSettings], defaults: Defaults) -> float:
    """Return Serve's `graceful_shutdown_timeout_s` of the Pipeline.

    Args:
        denoisers: The pools of the denoise stage.
        defaults: Of the model.
    """
    return max(_denoising_s(pool, defaults) for pool in denoisers)


def _denoising_s(pool: PoolSettings, defaults: Defaults) -> float:
    """Return what all requests that a denoiser may hold take, twice.

    Of the model's usual size and steps, one after the other at the speed of its kind of card.
    """
    if not pool.num_gpus:
        return _LEAST_S
    step_s = H100_STEP_S / estimated_speed(pool)
    step_s *= defaults.width * defaults.height / _MEASURED_PIXELS
    held_s = pool.max_ongoing_requests * defaults.num_inference_steps * step_s
    return min(max(_TO_SPARE * held_s, _LEAST_S), _MOST_S)
