"""What a replica counts, in Kelvin's own terms; `serve.metric_table` says what each means.

Ray Serve's own metrics (requests, queues, latency a deployment) are there anyway; these say what
only Kelvin knows.
"""

from __future__ import annotations

from time import monotonic
from typing import Literal

from cluster.heat_reading import Reading
from cluster.pool_state import ReplicaState
from serve.metric_table import METRICS
from serve.recorders import Recorders
from serve.requests import EventName

Stage = Literal["text", "encode", "denoise", "decode", "store"]
Waiting = Literal["text", "encode", "denoise", "decode", "share"]

_BETWEEN_HEAT_S = 1.0
# Statistics are asked for every second and health every ten: who was not asked for longer knows
# nothing of the time between.
_LONGEST_BETWEEN_HEAT_S = 30.0


class Metrics:
    """Counts what a replica does. Outside a replica, without an endpoint, methods do nothing."""

    def __init__(self) -> None:
        self._heat_at = float("-inf")
        self._to = Recorders()

    def stage_seconds(self, stage: Stage, seconds: float) -> None:
        """Count one piece of a stage's work, in seconds."""
        self._record("kelvin_stage_seconds", seconds, stage=stage)

    def queue_seconds(self, stage: Waiting, seconds: float) -> None:
        """Count what one piece of work waited, in seconds."""
        self._record("kelvin_queue_seconds", seconds, stage=stage)

    def queue_length(self, stage: Stage, waiting: int) -> None:
        """Set how many pieces of work wait inside this replica."""
        self._record("kelvin_queue_length", waiting, stage=stage)

    def step(self, seconds: float, rows: int, path: str) -> None:
        """Count one forward of a denoiser.

        Args:
            seconds: That it took.
            rows: In it.
            path: `graph` or `eager`.
        """
        self._record("kelvin_step_seconds", seconds, path=path)
        self._record("kelvin_step_rows", rows)

    def cache_lookup(self, *, hit: bool) -> None:
        """Count one prompt looked up in the embedding cache."""
        self._record("kelvin_text_cache_lookups_total", 1, result="hit" if hit else "miss")

    def images(self, count: int = 1) -> None:
        """Count pictures that were stored."""
        self._add("kelvin_images_total", count)

    def joules(self, joules: float) -> None:
        """Count the energy of one picture."""
        self._add("kelvin_energy_joules_total", joules)

    def gpu_seconds(self, tenant: str, seconds: float) -> None:
        """Count the stages' work for one job of a tenant."""
        self._add("kelvin_gpu_seconds_total", seconds, tenant=tenant)

    def moved(self, moves: int, steps_repeated: int) -> None:
        """Count a picture's moves from one denoiser to another, and the steps done again."""
        self._add("kelvin_moves_total", moves)
        self._add("kelvin_steps_repeated_total", steps_repeated)

    def job_ended(self, event: EventName, seconds: float | None = None) -> None:
        """Count one job by its last event, and its seconds since acceptance where known."""
        status = "succeeded" if event == "stored" else event
        self._record("kelvin_jobs_total", 1, status=status)
        if seconds is not None:
            self._record("kelvin_job_seconds", seconds, status=status)

    def refused(
        self, code: str, requests: int = 1, *, by: Literal["pipeline", "proxy"] = "pipeline"
    ) -> None:
        """Count requests that were not accepted, by their error's code."""
        self._add("kelvin_requests_refused_total", requests, code=code, by=by)

    def journal_written(self, record: Literal["accept", "publish"], seconds: float) -> None:
        """Count one record of a job, written to the journal in so many seconds."""
        self._record("kelvin_journal_write_seconds", seconds, record=record)

    def jobs_running(self, jobs: int, *, holds_lease: bool) -> None:
        """Set how many jobs live in this Pipeline, and whether it holds its lease."""
        self._record("kelvin_jobs_running", jobs)
        self._record("kelvin_journal_lease_held", float(holds_lease))

    def spool(self, used_bytes: int, limit_bytes: int, waiting_pictures: int) -> None:
        """Set what waits for the object store here."""
        self._record("kelvin_spool_used_bytes", used_bytes)
        self._record("kelvin_spool_limit_bytes", limit_bytes)
        self._record("kelvin_spool_waiting_pictures", waiting_pictures)

    def heat(self, state: ReplicaState, reading: Reading | None) -> None:
        """Set what is known of a denoiser's load and card; not more than once a second."""
        now = monotonic()
        since = now - self._heat_at
        if since < _BETWEEN_HEAT_S or self._to.is_empty():
            return
        self._heat_at = now
        self._record("kelvin_replica_work_seconds", state.waiting_s, state="waiting")
        self._record("kelvin_replica_work_seconds", state.running_s, state="running")
        self._record("kelvin_replica_rows", state.rows)
        # A rehearsal says so, also where it slows forwards down; `none` is a card that is not read.
        source = "none" if reading is None else reading.source
        self._record("kelvin_replica_duty_ratio", state.duty, source=source)
        self._set("kelvin_replica_slowdown_ratio", state.slowdown, source=source)
        if reading is None:
            return
        is_throttled = reading.is_throttling
        self._record("kelvin_gpu_throttled", float(is_throttled), source=source)
        if is_throttled and since <= _LONGEST_BETWEEN_HEAT_S:
            self._add("kelvin_gpu_throttle_seconds_total", since, source=source)
        self._set("kelvin_gpu_temperature_celsius", reading.temperature_c, source=source)
        self._set("kelvin_gpu_temperature_margin_celsius", reading.margin_c, source=source)
        self._set("kelvin_gpu_power_watts", reading.power_w, source=source)
        self._set("kelvin_gpu_reading_age_seconds", state.reading_age_s, source=source)

    def _set(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            self._record(name, value, **labels)

    def _add(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:
            self._record(name, amount, **labels)

    def _record(self, name: str, value: float, **labels: str) -> None:
        self._to.record(METRICS[name], value, labels)
