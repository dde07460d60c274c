"""Replicas that are asked to go are given the time that what they hold takes."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.pool_state import Stage
from serve.config import PoolSettings
from serve.graceful_shutdown import graceful_shutdown_s, pipeline_graceful_shutdown_s
from serve.models import Defaults

LARGE = Defaults(
    width=1024,
    height=1024,
    num_inference_steps=28,
    guidance_scale=4.5,
    shift=3.0,
    max_sequence_length=256,
)


def pool(**fields: Any) -> PoolSettings:
    return PoolSettings(**({"name": "denoiser"} | fields))


L4: dict[str, Any] = {"num_gpus": 1, "accelerator_type": "L4", "max_ongoing_requests": 16}


def test_a_full_l4_whose_work_does_not_move_may_end_it() -> None:
    l4 = pool(**L4, checkpoint_every_steps=0)
    # 16 requests of 28 steps of 0.7 s each, and as much to spare.
    assert graceful_shutdown_s("denoise", l4, LARGE) == pytest.approx(2 * 16 * 28 * 0.7, rel=0.01)
    half = l4.model_copy(update={"max_ongoing_requests": 8})
    assert graceful_shutdown_s("denoise", half, LARGE) == pytest.approx(16 * 28 * 0.7, rel=0.01)


def test_who_hands_its_work_over_needs_no_longer_than_others_and_a_pipeline_waits_for_it() -> None:
    pools = [pool(), pool(**L4)]
    assert graceful_shutdown_s("denoise", pools[1], LARGE) == 120.0
    waits = pipeline_graceful_shutdown_s(pools, LARGE)
    assert waits == pytest.approx(2 * 16 * 28 * 0.7, rel=0.01)


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_who_is_quick_or_no_card_keeps_two_minutes(stage: Stage) -> None:
    assert graceful_shutdown_s(stage, pool(num_gpus=0), LARGE) == 120.0
    h100 = pool(num_gpus=1, accelerator_type="H100", max_ongoing_requests=16)
    assert graceful_shutdown_s(stage, h100, LARGE) == 120.0


def test_nobody_waits_longer_than_an_hour() -> None:
    slow = pool(num_gpus=1, kind_speed=0.001, checkpoint_every_steps=0)
    assert graceful_shutdown_s("denoise", slow, LARGE) == 3600.0
