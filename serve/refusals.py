"""What is refused before a job is written down.

A job accepted and then dropped by a full queue, or by a stage that cannot do it, would be a promise
broken.
"""

from __future__ import annotations

from collections.abc import Collection

from cluster.places import Places
from deployments.sd3.sigmas import make_sigmas
from serve.config import PoolSettings
from serve.errors import DeadlineExceeded, Overloaded, StageUnavailable
from serve.forecast import Forecast
from serve.outside_line import OutsideLine
from serve.requests import GenerateRequest
from serve.running import RunningJob
from serve.served_models import ServedModel, ServedModels
from serve.tenants import DEFAULT_TENANT


def check_schedule(request: GenerateRequest) -> None:
    """Refuse now what the denoiser would refuse after the job was accepted.

    Raises:
        InvalidRequest: The noise levels of this shift, scheduler and number of steps coincide.
    """
    if request.scheduler and request.num_inference_steps and request.shift is not None:
        make_sigmas(request.scheduler, request.num_inference_steps, request.shift)


def refuse_if_full(
    models: ServedModels,
    model: ServedModel,
    request: GenerateRequest,
    live: Collection[RunningJob],
    share: float = 1.0,
    tenant: str | None = None,
) -> None:
    """Refuse pictures that a stage of their model has no place for.

    Where there are several tenants, each may take up as much as it leaves free, so one alone gets
    half of the room, two a third each (Choudhury and Hahne 1998, "Dynamic Queue Length
    Thresholds"), and who comes later always finds some.

    Args:
        models: Of the service.
        model: Of the request.
        request: Resolved.
        live: Jobs of this process; those of other models count where they share a stage's pools.
        share: Of the room, that may be taken up.
        tenant: Whose request it is; None: nobody leaves room for others.

    Raises:
        Overloaded: Says how many there may be.
    """
    for stage, pools in model.facts.settings.pools.items():
        stage_pools = model.stages.pools[stage].keys()
        pictures = own = 0
        for job in live:
            other = models.met(job.request.model)
            if other is not None and other.stages.pools[stage].keys() == stage_pools:
                pictures += job.request.num_images
                own += job.request.num_images if job.tenant == tenant else 0
        most = sum(map(_capacity, pools))
        if pictures and pictures + request.num_images > share * most:
            raise Overloaded(
                f"{pictures} pictures are being made or wait.",
                field="num_images",
                value=request.num_images,
                allowed=f"at most {most} at once; Retry-After says when to try",
            )
        is_shared = tenant is not None and (
            tenant != DEFAULT_TENANT or any(job.tenant != tenant for job in live)
        )
        if is_shared and own and own + request.num_images > share * most - pictures:
            raise Overloaded(
                f"{own} pictures of this tenant are being made or wait, {pictures} of all.",
                field="num_images",
                value=request.num_images,
                allowed=f"no more than are left free of {most}; Retry-After says when to try",
            )


def refuse_if_late(
    model: ServedModel,
    request: GenerateRequest,
    forecast: Forecast,
    places: Places,
    key: bytes,
    tenant: str,
    outside: OutsideLine | None = None,
) -> None:
    """Refuse a request that would not be done before its deadline.

    Where nothing is under way a request is taken if it can be done at all, whatever was learnt of
    slower times: else nothing would ever show that those are over.

    Args:
        model: Of the request.
        request: Resolved.
        forecast: Of it.
        places: Of those who were told to come again, before others.
        key: Of the request among those.
        tenant: Whose it is.
        outside: The line that its front door keeps, where it does.

    Raises:
        DeadlineExceeded: It could not be met even with nothing else to do.
        Overloaded: Because of what is under way; says when it would be met.
        StageUnavailable: Because a stage has no replica.
    """
    deadline_s, estimate, now = request.deadline_s, forecast.estimate, forecast.at
    if deadline_s is None or estimate is None:
        return
    room_s = places.room(deadline_s, key, now)
    if outside is not None:
        room_s = min(room_s, outside.room(deadline_s))
    if estimate.at_most_s <= room_s:
        places.came(key)
        return
    if (down := model.outlook.down()) is not None:
        stage, start_s = down
        model.stages.wake()
        raise StageUnavailable(
            f"Stage {stage!r} has no replica now, and one takes about {start_s:.0f} s to start.",
            field="deadline_s",
            value=deadline_s,
            allowed="more seconds, no deadline, or later; Retry-After says when",
            retry_after_s=start_s,
        )
    if (least_s := estimate.completion.least_s) > deadline_s:
        raise DeadlineExceeded(
            f"The request takes {least_s:.3g} s or more even when nothing else is to be done.",
            field="deadline_s",
            value=deadline_s,
            allowed="more seconds, a smaller request, or no deadline",
        )
    if not forecast.is_idle:
        wait_s, busy_s = estimate.wait_s(room_s), estimate.busy_s
        raise Overloaded(
            f"The request would be done in about {estimate.expected_s:.2g} s, and surely in "
            f"{estimate.at_most_s:.2g} s.",
            field="deadline_s",
            value=deadline_s,
            allowed="more seconds, or later; Retry-After says when",
            retry_after_s=places.promise(key, wait_s, busy_s, now, whose=tenant.encode())
            if outside is None
            else outside.refuse(wait_s, busy_s),
        )


def _capacity(pool: PoolSettings) -> float:
    """Return how many pictures a pool takes from one Pipeline, waiting ones included."""
    if pool.max_queued_requests < 0:
        return float("inf")
    return pool.most_replicas * pool.max_ongoing_requests + pool.max_queued_requests
