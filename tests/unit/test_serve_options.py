"""What Serve is asked for: bounded queues, 429 beyond them, and a derived time to end in."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from serve.app import _ServedPipeline, build
from serve.config import Settings
from serve.graceful_shutdown import graceful_shutdown_s, pipeline_graceful_shutdown_s
from serve.model_dir import resolve_model_dir
from serve.models import ModelSpec

# What does not move may take long on a slow card.
SLOW = {"name": "slow", "num_gpus": 1, "kind_speed": 1e-6, "checkpoint_every_steps": 0}
SETTINGS = Settings.model_validate(
    {"model": {"path": "pico"}, "denoiser": [SLOW | {"max_queued_requests": 7}]}
)
DEFAULTS = ModelSpec.from_directory(resolve_model_dir(SETTINGS.model, weights=False)).defaults


def asked() -> tuple[Any, dict[str, Any]]:
    """Return the Pipeline's deployment, and those of pools by name."""
    bound = build(SETTINGS)._bound_deployment
    return bound, {name: each._bound_deployment for name, each in bound.init_args[2].items()}


def test_every_queue_is_bounded_and_what_finds_it_full_is_told_to_come_again():
    pipeline, pools = asked()
    for stage_pools in SETTINGS.pools.values():
        for pool in stage_pools:
            queue = pools[pool.name]._deployment_config.max_queued_requests
            assert queue == pool.max_queued_requests >= 0
    config = pipeline._deployment_config
    room = SETTINGS.pipeline.max_ongoing_requests
    assert room < config.max_ongoing_requests < 2 * room
    assert 0 < config.max_queued_requests < 2 * room
    assert config.backpressure_config.status_code == 429
    assert config.backpressure_config.retry_after_s > 0


def test_how_long_who_goes_may_take_follows_from_what_they_may_hold():
    pipeline, pools = asked()
    for stage, stage_pools in SETTINGS.pools.items():
        for pool in stage_pools:
            given = pools[pool.name]._deployment_config.graceful_shutdown_timeout_s
            assert given == graceful_shutdown_s(stage, pool, DEFAULTS)
    given = pipeline._deployment_config.graceful_shutdown_timeout_s
    assert given == pipeline_graceful_shutdown_s(SETTINGS.denoiser, DEFAULTS)
    assert given > 120, "as long as what does not move"


def test_serve_waits_for_what_a_pipeline_still_has():
    departed = []

    async def depart() -> None:
        departed.append(True)

    # What Serve calls and awaits; of an object of the class the interpreter would call it as well.
    asyncio.run(_ServedPipeline.__del__(cast(Any, SimpleNamespace(depart=depart))))
    assert departed
