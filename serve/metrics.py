"""Prometheus metrics of Kelvin's own, by way of Ray: base units, tagged by deployment and replica.

Ray Serve's own metrics (requests, queues, latency a deployment) are there anyway; these say what
only Kelvin knows. Ray exports each name with `ray_` in front.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Literal

from cluster.heat_reading import Reading
from cluster.pool_state import ReplicaState
from serve.requests import EventName

if TYPE_CHECKING:
    from ray.serve.metrics import Counter, Gauge, Histogram

Stage = Literal["text", "encode", "denoise", "decode", "store"]

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
_BETWEEN_HEAT_S = 1.0


class Metrics:
    """Counts what a replica does. Outside a replica every method does nothing.

    kelvin_stage_seconds{stage}: work of one stage for one request or picture.
    kelvin_queue_length{stage}: what waits inside this replica.
    kelvin_images_total: pictures stored.
    kelvin_energy_joules_total: energy of denoising stored pictures, where cards tell it.
    kelvin_gpu_seconds_total{tenant}: seconds of work of the stages, by `serve.tenant_book`.
    kelvin_moves_total, kelvin_steps_repeated_total: pictures that went on in another denoiser, and
    what that cost.
    kelvin_jobs_total{status}, kelvin_job_seconds{status}: jobs ended, from acceptance.
    kelvin_replica_work_seconds{state}: cool seconds of work, waiting or running, in a denoiser.
    kelvin_replica_rows: of a denoiser's last forward; 0 while it has nothing to do.
    kelvin_replica_slowdown_ratio{source}: a forward's time over its time while the card was cool.
    kelvin_replica_duty_ratio{source}: share of the time that the governor lets the card compute.
    kelvin_gpu_temperature_celsius{source}, kelvin_gpu_temperature_margin_celsius{source},
    kelvin_gpu_power_watts{source}, kelvin_gpu_throttled{source},
    kelvin_gpu_reading_age_seconds{source}: the card; a rehearsal has source="scripted", also where
    it slows forwards down; source="none" is a card that is not read.
    """

    def __init__(self) -> None:
        self._heat_at = float("-inf")
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

    def gpu_seconds(self, tenant: str, seconds: float) -> None:
        """Count the stages' work for one job of a tenant."""
        if seconds > 0 and (made := self._instruments()) is not None:
            made.gpu_seconds.inc(seconds, tags={"tenant": tenant})

    def moved(self, moves: int, steps_repeated: int) -> None:
        """Count a picture's moves from one denoiser to another, and the steps done again."""
        if moves > 0 and (made := self._instruments()) is not None:
            made.moves.inc(moves)
            if steps_repeated > 0:
                made.steps_repeated.inc(steps_repeated)

    def job_ended(self, event: EventName, seconds: float | None = None) -> None:
        """Count one job by its last event, and its seconds since acceptance where known."""
        if (made := self._instruments()) is not None:
            status = "succeeded" if event == "stored" else event
            made.jobs.inc(tags={"status": status})
            if seconds is not None:
                made.job_seconds.observe(seconds, tags={"status": status})

    def heat(self, state: ReplicaState, reading: Reading | None) -> None:
        """Set what is known of a denoiser's load and card; not more than once a second."""
        now = time.monotonic()
        if now < self._heat_at + _BETWEEN_HEAT_S or (made := self._instruments()) is None:
            return
        self._heat_at = now
        made.work.set(state.waiting_s, tags={"state": "waiting"})
        made.work.set(state.running_s, tags={"state": "running"})
        made.rows.set(state.rows)
        tags = {"source": "none" if reading is None else reading.source}
        made.duty.set(state.duty, tags=tags)
        if state.slowdown is not None:
            made.slowdown.set(state.slowdown, tags=tags)
        if reading is None:
            return
        made.throttled.set(float(reading.is_throttling), tags=tags)
        for gauge, value in (
            (made.temperature, reading.temperature_c),
            (made.margin, reading.margin_c),
            (made.power, reading.power_w),
            (made.reading_age, state.reading_age_s),
        ):
            if value is not None:
                gauge.set(value, tags=tags)

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
    gpu_seconds: Counter
    moves: Counter
    steps_repeated: Counter
    jobs: Counter
    job_seconds: Histogram
    work: Gauge
    rows: Gauge
    slowdown: Gauge
    duty: Gauge
    temperature: Gauge
    margin: Gauge
    power: Gauge
    throttled: Gauge
    reading_age: Gauge

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
        self.gpu_seconds = Counter(
            "kelvin_gpu_seconds_total", "Seconds of work of the stages.", ("tenant",)
        )
        self.moves = Counter("kelvin_moves_total", "Pictures that went on in another denoiser.")
        self.steps_repeated = Counter("kelvin_steps_repeated_total", "Steps done again for that.")
        self.jobs = Counter("kelvin_jobs_total", "Jobs ended.", ("status",))
        self.job_seconds = Histogram(
            "kelvin_job_seconds", "Seconds from acceptance to the end.", _SECONDS, ("status",)
        )
        source = ("source",)
        self.work = Gauge(
            "kelvin_replica_work_seconds", "Work of a denoiser, in seconds when cool.", ("state",)
        )
        self.rows = Gauge("kelvin_replica_rows", "Of a denoiser's last forward.")
        self.slowdown = Gauge(
            "kelvin_replica_slowdown_ratio", "A forward's time over its time when cool.", source
        )
        self.duty = Gauge("kelvin_replica_duty_ratio", "Share of the time it may compute.", source)
        self.temperature = Gauge(
            "kelvin_gpu_temperature_celsius", "Temperature of the card.", ("source",)
        )
        self.margin = Gauge(
            "kelvin_gpu_temperature_margin_celsius", "Degrees to its slowdown.", ("source",)
        )
        self.power = Gauge("kelvin_gpu_power_watts", "Power of the card.", ("source",))
        self.throttled = Gauge(
            "kelvin_gpu_throttled", "1 while the card is slowed down for heat.", ("source",)
        )
        self.reading_age = Gauge(
            "kelvin_gpu_reading_age_seconds", "Since the card was last read.", ("source",)
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
