"""When a request would be done if it were accepted now; and what became of earlier forecasts.

All on one event loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.completion import completion
from cluster.pace import Estimate, Pace
from cluster.places import Places
from cluster.pool_state import Stage
from cluster.work_sizes import Asked
from serve.requests import EventName, GenerateRequest
from serve.running import RunningJob
from serve.served_models import ServedModel
from serve.tenant_settings import TenantSettings
from serve.tenants import DEFAULT_TENANT
from serve.work_ahead import Pools, WorkAhead, kinds_of


@dataclass(frozen=True)
class Forecast:
    """Of one request.

    Attributes:
        estimate: None where nothing like it was ever done.
        is_idle: Nothing is ahead of it here.
        at: When it was made, in seconds.
    """

    estimate: Estimate | None
    is_idle: bool
    at: float


class Forecaster:
    """Of one Pipeline.

    Args:
        tenants: Their weights.
        clock: Seconds, never going back.

    Attributes:
        places: Of those who were told to come again.
    """

    def __init__(
        self, tenants: TenantSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tenants = tenants
        self._clock = clock
        self.places = Places()
        self._ahead = WorkAhead()
        self._paces: dict[str, Pace] = {}

    def of(self, model: ServedModel, request: GenerateRequest, tenant: str) -> Forecast:
        """Return when a resolved request would be done."""
        stages = []
        is_idle = True
        for stage, (kind, size) in kinds_of(request).items():
            by_tenant = self._ahead.of(_pools(model, stage))
            is_idle = is_idle and not by_tenant
            pieces = 1 if stage == "text" else request.num_images
            before = self._work_before(by_tenant, tenant)
            outlook = model.outlook.stage(stage, kind, size, pieces, before)
            if outlook is not None:
                stages.append(outlook)
            elif stage == "denoise":
                return Forecast(None, is_idle, self._clock())
        pace, now = self._pace(model.facts.spec.name), self._clock()
        return Forecast(pace.estimate(completion(stages), now), is_idle, now)

    def take_on(
        self, job: RunningJob, model: ServedModel, estimate: Estimate | None = None
    ) -> None:
        """Count a job's work until it is done; with an estimate, learn how true that was."""
        pools = {stage: _pools(model, stage) for stage in model.stages.pools}
        job.work_left = self._ahead.take_on(job.request, job.tenant, pools)
        job.estimate = estimate
        if estimate is not None:
            self._pace(model.facts.spec.name).accepted(estimate.completion)
        else:
            self._pace(model.facts.spec.name).disturbed()

    def ended(self, job: RunningJob, last: EventName, *, is_last: bool) -> None:
        """Learn from a job's end.

        Args:
            job: It.
            last: How it ended.
            is_last: No other is under way: the queue, if there was one, is at its end.
        """
        if job.request.model is None:
            return
        pace = self._pace(job.request.model)
        if is_last:
            pace.disturbed()
        if job.estimate is None:
            return
        if last != "stored" and job.work_left is not None:
            pace.dropped(job.estimate.completion.own_s * job.work_left.undone)
        if last == "stored" or (job.error is not None and job.error.code == "deadline_exceeded"):
            took_s = time.monotonic() - job.accepted_at
            pace.ended(job.estimate, took_s)

    def _work_before(
        self, by_tenant: Mapping[str, Mapping[Asked, int]], tenant: str
    ) -> Mapping[Asked, float]:
        """Return the work that is done before a tenant's next request, as it will seem to them.

        All of it, first come, first served; or, where tenants share, the tenant's own at the pace
        that is left if one more tenant comes. Fair turns can delay a request by that much.
        """
        total: Counter[Asked] = Counter()
        for counts in by_tenant.values():
            total.update(counts)
        own = by_tenant.get(tenant, {})
        if tenant == DEFAULT_TENANT and by_tenant.keys() <= {tenant}:
            return total
        weights = sum(self._tenants.of(each).weight for each in {*by_tenant, tenant})
        slower = (weights + self._tenants.weight) / self._tenants.of(tenant).weight
        return {kind: max(number, slower * own.get(kind, 0)) for kind, number in total.items()}

    def _pace(self, model: str) -> Pace:
        return self._paces.setdefault(model, Pace())


def _pools(model: ServedModel, stage: Stage) -> Pools:
    return tuple(model.stages.pools[stage])
