"""What each tenant has used in this process, and whether it may use more.

Limits hold for the whole service; each of n Pipelines grants the n-th part of them by itself, for
they share no counters. Serve spreads calls evenly, so that comes to the limit; a tenant all of
whose calls meet one Pipeline gets its part only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from serve.errors import LimitReached
from serve.init_image import LARGEST_FILE
from serve.metrics import Metrics
from serve.requests import LARGEST_NUM_IMAGES, EventName
from serve.running import RunningJob
from serve.tenant_settings import TenantSettings
from serve.token_bucket import TokenBucket

_LEAST_RETRY_S = 1.0
_MEAN_OF = 10.0
_MIB = 1 << 20


@dataclass
class Usage:
    """What a tenant has used since this process started.

    Attributes:
        gpu_seconds: Of text encoding, denoising and decoding; a picture's denoising counts as many
            as it takes alone on a cool card of its kind, so nobody pays for company or heat. What
            was done of pictures that were not finished counts too, as it passed.
        images: Stored.
        joules: Of denoising them, where cards tell.
    """

    jobs_succeeded: int = 0
    jobs_failed: int = 0
    jobs_cancelled: int = 0
    images: int = 0
    gpu_seconds: float = 0.0
    joules: float = 0.0


class TenantBook:
    """All tenants met by one Pipeline; on one event loop.

    Args:
        settings: Their limits.
        pipelines: That share them.
        metrics: Of this process.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        settings: TenantSettings,
        pipelines: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._pipelines = pipelines
        self._metrics = metrics
        self._clock = clock
        self._began = time.time()
        self._buckets: dict[str, TokenBucket] = {}
        self._upload_buckets: dict[str, TokenBucket] = {}
        self._usage: dict[str, Usage] = {}
        self._job_s: dict[str | None, float] = {}  # None: of all tenants

    def take(self, tenant: str, images: int, live: Collection[RunningJob]) -> None:
        """Count pictures that are about to be accepted.

        Args:
            tenant: Whose.
            images: How many.
            live: All jobs of this process.

        Raises:
            LimitReached: Says when to try again.
        """
        limits = self._settings.of(tenant)
        own = [job for job in live if job.tenant == tenant and not job.is_given_up]
        if limits.max_jobs is not None:
            most = math.ceil(limits.max_jobs / self._pipelines)
            if len(own) >= most:
                raise LimitReached(
                    f"{len(own)} jobs of this tenant are under way.",
                    field="max_jobs",
                    value=len(own) + 1,
                    allowed=f"at most {most} at a time here, of {limits.max_jobs} in all",
                    retry_after_s=self.until_one_ends(own, tenant),
                )
        if limits.images_per_minute is not None:
            rate = limits.images_per_minute / self._pipelines
            if tenant not in self._buckets:
                saved = max(rate, float(LARGEST_NUM_IMAGES))
                self._buckets[tenant] = TokenBucket(rate / 60, saved, self._clock())
            wait_s = self._buckets[tenant].take(images, self._clock())
            if wait_s is not None:
                raise LimitReached(
                    "This tenant has asked for its pictures of this minute.",
                    field="images_per_minute",
                    value=images,
                    allowed=f"{rate:g} a minute here, of {limits.images_per_minute:g} in all",
                    retry_after_s=wait_s,
                )

    def take_upload(self, tenant: str, size_bytes: int) -> None:
        """Count a start image that is about to be kept.

        Args:
            tenant: Whose.
            size_bytes: Of its file.

        Raises:
            LimitReached: Says when to try again.
        """
        limit = self._settings.of(tenant).upload_mib_per_minute
        if limit is None:
            return
        rate = limit / self._pipelines
        # One file is let through however low the limit is; the next ones wait for it.
        saved = max(rate, LARGEST_FILE / _MIB)
        mib = min(size_bytes / _MIB, saved)
        if tenant not in self._upload_buckets:
            self._upload_buckets[tenant] = TokenBucket(rate / 60, saved, self._clock())
        wait_s = self._upload_buckets[tenant].take(mib, self._clock())
        if wait_s is not None:
            raise LimitReached(
                "This tenant has sent its start images of this minute.",
                field="upload_mib_per_minute",
                value=round(mib, 3),
                allowed=f"{rate:g} MiB a minute here, of {limit:g} in all",
                retry_after_s=wait_s,
            )

    def give_back(self, tenant: str, images: int) -> None:
        """Undo `take`: they were not accepted."""
        if tenant in self._buckets:
            self._buckets[tenant].give_back(images)

    def ended(self, job: RunningJob, last: EventName) -> None:
        """Count what a job used, once it has ended here."""
        usage = self._usage.setdefault(job.tenant, Usage())
        usage.gpu_seconds += job.gpu_s
        self._metrics.gpu_seconds(job.tenant, job.gpu_s)
        result = job.newest.result if job.newest is not None else None
        if last == "stored":
            usage.jobs_succeeded += 1
            usage.images += job.request.num_images
            usage.joules += (result.joules if result is not None else None) or 0.0
            took_s = time.monotonic() - job.accepted_at
            for whose in (job.tenant, None):
                mean_s = self._job_s.setdefault(whose, took_s)
                self._job_s[whose] = mean_s + (took_s - mean_s) / _MEAN_OF
        elif last == "cancelled":
            usage.jobs_cancelled += 1
        else:
            usage.jobs_failed += 1

    def usage(self, tenant: str) -> dict[str, Any]:
        """Return what a tenant has used, and since when (Unix seconds) it is counted."""
        used = self._usage.get(tenant, Usage())
        return {"tenant": tenant, "since": self._began, **asdict(used)}

    def as_json(self) -> list[dict[str, Any]]:
        """Return what every tenant has used."""
        return [self.usage(tenant) for tenant in sorted(self._usage)]

    def between_ends(self, jobs: Collection[RunningJob]) -> float:
        """Return the seconds from one job's end to the next one's, if all take as usual.

        Little's law: as many jobs end in the time that each of them takes as there are.

        Args:
            jobs: Under way.
        """
        return self._job_s.get(None, 0.0) / max(len(jobs), 1)

    def until_one_ends(self, jobs: Collection[RunningJob], tenant: str | None = None) -> float:
        """Return the seconds after which the first of these jobs ends, if they take as usual.

        Args:
            jobs: Under way.
            tenant: Whose jobs tell what is usual; None: everybody's.
        """
        usual_s = self._job_s.get(tenant, 0.0)
        ages = [time.monotonic() - job.accepted_at for job in jobs]
        return max(_LEAST_RETRY_S, usual_s - max(ages, default=0.0))
