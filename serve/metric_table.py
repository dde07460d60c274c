"""Every metric that replicas of stages and Pipelines record, by name.

Those of the plan, which Serve's controller alone knows, are in `cluster.pool_gauges`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cluster.metric_spec import MetricSpec

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# A step: of pico on a CPU 2 ms, of Large on an H100 84 ms, on an L4 seconds.
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)

_ALL = (
    MetricSpec(
        "kelvin_stage_seconds",
        "histogram",
        "s",
        "Work of one stage for one request or picture: text, encode, denoise, decode, store.",
        ("stage",),
        _SECONDS,
    ),
    MetricSpec(
        "kelvin_queue_seconds",
        "histogram",
        "s",
        "Waited before a stage's work: in its replica, or, as stage share, in the Pipeline for the"
        " turn of its tenant.",
        ("stage",),
        _SECONDS,
    ),
    MetricSpec(
        "kelvin_queue_length", "gauge", "{request}", "Work waiting in a replica.", ("stage",)
    ),
    MetricSpec(
        "kelvin_step_seconds",
        "histogram",
        "s",
        "One denoising forward, which is a step of every request in it.",
        ("path",),
        _STEP_SECONDS,
    ),
    MetricSpec("kelvin_step_rows", "histogram", "{row}", "Rows of one forward.", buckets=_ROWS),
    MetricSpec(
        "kelvin_text_cache_lookups_total",
        "counter",
        "{lookup}",
        "Prompts looked up in the embedding cache; result hit or miss.",
        ("result",),
    ),
    MetricSpec("kelvin_images_total", "counter", "{image}", "Pictures stored."),
    MetricSpec(
        "kelvin_energy_joules_total",
        "counter",
        "J",
        "Energy of denoising stored pictures, where cards tell it.",
        is_rare=True,
    ),
    MetricSpec("kelvin_gpu_seconds_total", "counter", "s", "Work of the stages.", ("tenant",)),
    MetricSpec(
        "kelvin_moves_total",
        "counter",
        "{move}",
        "Pictures that went on in another denoiser.",
        is_rare=True,
    ),
    MetricSpec(
        "kelvin_steps_repeated_total",
        "counter",
        "{step}",
        "Steps done again for that.",
        is_rare=True,
    ),
    MetricSpec("kelvin_jobs_total", "counter", "{job}", "Jobs ended.", ("status",)),
    MetricSpec(
        "kelvin_requests_refused_total",
        "counter",
        "{request}",
        "Requests that a Pipeline did not accept, by the error's code; or the proxy in front, which"
        " says so with the next request that it lets through.",
        ("code", "by"),
        is_rare=True,
    ),
    MetricSpec(
        "kelvin_job_seconds",
        "histogram",
        "s",
        "From a job's acceptance to its end.",
        ("status",),
        _SECONDS,
    ),
    MetricSpec("kelvin_jobs_running", "gauge", "{job}", "Jobs that live in a Pipeline."),
    MetricSpec(
        "kelvin_journal_write_seconds",
        "histogram",
        "s",
        "One record written, retries included; record accept or publish.",
        ("record",),
        _SECONDS,
    ),
    MetricSpec(
        "kelvin_journal_lease_held",
        "gauge",
        "{lease}",
        "1 while a Pipeline holds the lease without which it accepts and publishes nothing.",
    ),
    MetricSpec(
        "kelvin_spool_used_bytes",
        "gauge",
        "By",
        "Finished pictures on disk, waiting for the store.",
    ),
    MetricSpec("kelvin_spool_limit_bytes", "gauge", "By", "What they may take up."),
    MetricSpec(
        "kelvin_spool_waiting_pictures",
        "gauge",
        "{image}",
        "Finished pictures waiting for the store, on disk or in memory.",
    ),
    MetricSpec(
        "kelvin_replica_work_seconds",
        "gauge",
        "s",
        "Cool seconds of work, waiting or running, in a denoiser.",
        ("state",),
    ),
    MetricSpec(
        "kelvin_replica_rows",
        "gauge",
        "{row}",
        "Of a denoiser's last forward; 0 while it has nothing to do.",
    ),
    MetricSpec(
        "kelvin_replica_slowdown_ratio",
        "gauge",
        "1",
        "A forward's time over its time while the card was cool.",
        ("source",),
        is_rare=True,
    ),
    MetricSpec(
        "kelvin_replica_duty_ratio",
        "gauge",
        "1",
        "Share of the time that the governor lets the card compute.",
        ("source",),
    ),
    MetricSpec(
        "kelvin_gpu_temperature_celsius", "gauge", "Cel", "Temperature of the card.", ("source",)
    ),
    MetricSpec(
        "kelvin_gpu_temperature_margin_celsius",
        "gauge",
        "Cel",
        "Degrees to where it slows itself down.",
        ("source",),
    ),
    MetricSpec("kelvin_gpu_power_watts", "gauge", "W", "Power of the card.", ("source",)),
    MetricSpec(
        "kelvin_gpu_throttled",
        "gauge",
        "{card}",
        "1 while the card is slowed down for heat.",
        ("source",),
    ),
    MetricSpec(
        "kelvin_gpu_throttle_seconds_total",
        "counter",
        "s",
        "That the card was slowed down for heat.",
        ("source",),
        is_rare=True,
    ),
    MetricSpec(
        "kelvin_gpu_reading_age_seconds",
        "gauge",
        "s",
        "Since the card was last read.",
        ("source",),
    ),
)

METRICS: Final[Mapping[str, MetricSpec]] = {spec.name: spec for spec in _ALL}
