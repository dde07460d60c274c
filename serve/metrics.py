"""Prometheus metrics of Kelvin's own, by way of Ray: base units, tagged by deployment and replica.

Ray Serve's own metrics (requests, queues, latency a deployment) are there anyway; these say what
only Kelvin knows. Ray exports each name with `ray_` in front.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from serve.requests import EventName

if TYPE_CHECKING:
    from ray.serve.metrics import Counter, Gauge, Histogram

Stage = Literal["text", "denoise", "decode", "store"]

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]


class Metrics:
    """Counts what a replica does. Outside a replica every method does nothing.

    kelvin_stage_seconds{stage}: work of one stage for one request or picture.
    kelvin_queue_length{stage}: what waits inside this replica.
    kelvin_images_total: pictures stored.
    kelvin_energy_joules_total: energy of denoising stored pictures, where cards tell it.
    kelvin_jobs_total{status}, kelvin_job_seconds{status}: jobs ended, from acceptance.
    """

    def __init__(self) -> None:
        self._made: _Instruments | None = None
        self._looked = False

    def stage_seconds(self, stage: Stage, seconds: float) -> None:
        """Count one piece of a stage's work, in seconds."""
        if (made := self._instruments()) is not None:
            made.stage_seconds.observe(seconds, tags={"stage": stage})

    def queue_length(self, stage: Stage, waiting: int) -> None:
        """Set how many pieces of work wait inside this replica."""
        if (made := self._instruments()) is not None:
            made.queue_length.set(waiting, tags={"stage": stage})

    def images(self, count: int = 1) -> None:
        """Count pictures that were stored."""
        if count > 0 and (made := self._instruments()) is not None:
            made.images.inc(count)

    def joules(self, joules: float) -> None:
        """Count the energy of one picture."""
        if joules > 0 and (made := self._instruments()) is not None:
            made.joules.inc(joules)

    def job_ended(self, event: EventName, seconds: float | None = None) -> None:
        """Count one job by its last event, and its seconds since acceptance where known."""
        if (made := self._instruments()) is not None:
            status = "succeeded" if event == "stored" else event
            made.jobs.inc(tags={"status": status})
            if seconds is not None:
                made.job_seconds.observe(seconds, tags={"status": status})

    def _instruments(self) -> _Instruments | None:
        # On first use: in a replica's constructor, but also in a plain process that never has Ray.
        if not self._looked:
            self._made = _Instruments() if _in_replica() else None
            self._looked = True
        return self._made


class _Instruments:
    stage_seconds: Histogram
    queue_length: Gauge
    images: Counter
    joules: Counter
    jobs: Counter
    job_seconds: Histogram

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram

        self.stage_seconds = Histogram(
            "kelvin_stage_seconds", "Seconds of work of one stage.", _SECONDS, ("stage",)
        )
        self.queue_length = Gauge("kelvin_queue_length", "Work waiting in a replica.", ("stage",))
        self.images = Counter("kelvin_images_total", "Pictures stored.")
        self.joules = Counter(
            "kelvin_energy_joules_total", "Joules of denoising the pictures stored."
        )
        self.jobs = Counter("kelvin_jobs_total", "Jobs ended.", ("status",))
        self.job_seconds = Histogram(
            "kelvin_job_seconds", "Seconds from acceptance to the end.", _SECONDS, ("status",)
        )


def _in_replica() -> bool:
    if "ray" not in sys.modules:
        return False
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True
